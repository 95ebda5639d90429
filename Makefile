# Two commands do everything on a fresh machine: `make demo` and `make test`. Both build .venv if it is missing or stale.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.synced

.PHONY: demo test lint bench evidence fuzz gpu wheelhouse lock clean

$(STAMP): requirements.lock pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q uv
	.venv/bin/uv pip sync -q --compile-bytecode --python $(PY) requirements.lock
	.venv/bin/uv pip install -q --python $(PY) --no-deps -e .
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m pipelines.demo

# One process more than cores, because tests often wait for Ray and for child processes.
test: $(STAMP)
	$(PY) -m pytest -q -n $$($(PY) -c "from extract.cores import available_cores; print(available_cores() + 1)") --dist loadfile --no-loadscope-reorder tests

lint: $(STAMP)
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench: $(STAMP)
	$(PY) -m pytest -q -s tests/benchmarks/bench_*.py

evidence: $(STAMP)
	$(PY) tests/benchmarks/evidence.py

fuzz: $(STAMP)
	HGNL_FUZZ=all $(PY) -m pytest -q -s tests/test_fuzz.py tests/test_power.py tests/extract/test_video_models.py tests/extract/test_decode.py tests/gpu/test_prove.py

# For a machine with a GPU: uses the Python that has torch there. With a copy of wheelhouse/ it needs no network.
gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) tests/gpu/prove.py

wheelhouse: $(STAMP)
	$(PY) tests/gpu/wheelhouse.py

lock:
	.venv/bin/uv pip compile --universal --python-version 3.11 --extra demo --extra test --extra bench \
	  --no-header --no-annotate -q pyproject.toml -o requirements.lock

clean:
	rm -rf .venv runs build *.egg-info
