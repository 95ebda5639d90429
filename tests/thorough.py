"""Whether tests try every case, which takes long (`make fuzz`), or only one case of each kind."""

import os

THOROUGH = os.environ.get("HGNL_FUZZ") == "all"
