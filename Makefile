# make demo: install, build the packaged model for the CPU, draw a picture, build for an Ada GPU.
# make test: install what the tests need, run the daily tests and check style, types, imports and pages.
# make test-all: the same with all tests, which takes an hour.
# make test-lowest: daily tests with the lowest versions that pyproject.toml allows.
# make cpp: build libsd35 and run its units; it is installed into build/cpp/release/tree.
# make comfyui COMFYUI=DIR: try the nodes in the ComfyUI that is checked out there, on the CPU.
# make calibration: calibrate the packaged model anew, after its checkpoint changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGE := .[build,onnxruntime,rtx,test,docs]
TYPES := $(VENV)/types/sd35_trt
ROOMS := checkpoints programs calibration export engines runtime quality serving mini

# Of ComfyUI's requirements; what $(VENV) has is taken from there, PyTorch above all.
COMFYUI_VENV ?= .venv-comfyui

LOWEST := .venv-lowest
LOWEST_PACKAGE := .[build,onnxruntime,rtx,report,compare,metrics]
LOWEST_TESTS := tests/formats tests/calibration tests/export tests/runtime

.PHONY: demo test test-all test-lowest tests lint cpp comfyui calibration clean

demo: $(STAMP)
	$(BIN)/sd35-trt build --gpu cpu --out bundles/mini-cpu
	$(BIN)/sd35-trt generate bundles/mini-cpu "a large pink heart on a navy background" --seed 7 --out demo.png
	$(BIN)/sd35-trt build --gpu ada --out bundles/mini-ada
	$(BIN)/sd35-trt inspect bundles/mini-ada
	@echo "the picture is $(CURDIR)/demo.png; bundles/mini-ada is for GPUs with compute capability 8.9"

# Two at a time, each with one thread: most tests are Python, and they share a cache of stages.
# Files in their order: by xdist's own, the fullest come first, and one of few but long tests last.
tests: $(STAMP) $(VENV)/debian
	CMAKE_PREFIX_PATH=$(abspath $(VENV))/debian/usr OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --prepare $(SELECTED)

# What libsd35 is built with; where Debian's packages cannot be had, tests that need them skip.
$(VENV)/debian: $(STAMP)
	cpp/debian.sh $(VENV) || mkdir -p $@

# uv pip keeps what is installed where it suffices: what tests need besides comes in its newest version.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install -q --upgrade pip uv
	VIRTUAL_ENV=$(abspath $(LOWEST)) $(LOWEST)/bin/uv pip install -q --resolution lowest-direct -e "$(LOWEST_PACKAGE)"
	VIRTUAL_ENV=$(abspath $(LOWEST)) $(LOWEST)/bin/uv pip install -q accelerate hypothesis peft psutil pytest pytest-xdist pyyaml
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -m "not nightly" $(LOWEST_TESTS)

# The checks keep one processor busy: beside the tests, they take little time of their own.
test test-all: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint tests SELECTED='$(SELECTED)'

test: SELECTED := -m "not nightly"

# mypy and import-linter want the package as one tree; links make the stage folders part of it.
# Benchmarks are scripts, which import each other by path.
# MkDocs checks the links between the pages.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@ln -sfn $(CURDIR)/sd35_trt/* $(addprefix $(CURDIR)/,$(ROOMS)) $(TYPES)/
	cd $(VENV)/types && ../bin/mypy --config-file $(CURDIR)/pyproject.toml -p sd35_trt
	cd $(VENV)/types && MYPYPATH=.:$(CURDIR)/benchmarks ../bin/mypy --config-file $(CURDIR)/pyproject.toml $(CURDIR)/benchmarks
	cd $(VENV)/types && PYTHONPATH=. ../bin/lint-imports --config $(CURDIR)/pyproject.toml
	cd $(VENV)/types && MYPYPATH=.:$(CURDIR) ../bin/mypy --config-file $(CURDIR)/pyproject.toml -p comfyui
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir $(VENV)/site

# torch first: its version decides what the rest resolves to. uv takes seconds where pip takes
# minutes, but does not read pip's settings; where it fails for that, pip takes over.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "torch>=2.9,<2.14" uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install -q -e "$(PACKAGE)" || $(BIN)/pip install -q -e "$(PACKAGE)"
	@touch $@

cpp: $(VENV)/debian
	cpp/build.sh release
	cd cpp && ctest --preset release

# torchvision and torchaudio belong to one version of PyTorch.
$(COMFYUI_VENV)/.installed: $(STAMP) $(COMFYUI)/requirements.txt
	test -x $(COMFYUI_VENV)/bin/python || $(PYTHON) -m venv $(COMFYUI_VENV)
	echo "import site; site.addsitedir('$(abspath $(VENV))/lib/$(notdir $(lastword $(wildcard $(VENV)/lib/python3*)))/site-packages')" \
	  > $$(echo $(COMFYUI_VENV)/lib/python3*/site-packages)/sd35-trt.pth
	$(COMFYUI_VENV)/bin/python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > $(COMFYUI_VENV)/torch.txt
	$(COMFYUI_VENV)/bin/pip install -q --constraint $(COMFYUI_VENV)/torch.txt -r $(COMFYUI)/requirements.txt
	@touch $@

comfyui:
	@test -f "$(COMFYUI)/main.py" || { echo "say where ComfyUI is checked out: make comfyui COMFYUI=DIR"; exit 2; }
	$(MAKE) --no-print-directory $(COMFYUI_VENV)/.installed
	COMFYUI=$(abspath $(COMFYUI)) OMP_NUM_THREADS=1 $(COMFYUI_VENV)/bin/python -m pytest -s tests/comfyui

calibration: $(STAMP)
	$(BIN)/pip install -q -e ".[control]"
	$(BIN)/sd35-trt calibrate --model mini --policy fp8 --controlnet canny=mini:canny --out mini/calibration

clean:
	rm -rf $(VENV) $(COMFYUI_VENV) bundles build/cpp demo.png .mypy_cache .pytest_cache .ruff_cache
