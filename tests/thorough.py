"""Whether every case is tried, which takes long (`make fuzz`), or those that differ in what they show."""

import os

THOROUGH = os.environ.get("HGNL_FUZZ") == "all"
