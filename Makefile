# make demo    the shipped tiny model continues real text and answers about facts in its prompt
# make test    the test suite, in a virtual environment of its own
# make tiny    train the tiny model from nothing: tokenizer, phase 1, phase 2 and the control
# make bench   every number that the README claims

PYTHON ?= python3
RUN := .venv/bin/python
TRAIN := .venv/bin/torchrun --standalone --nproc_per_node=2 train.py

# One thread per process: on two busy cores two OpenMP threads cost several times the CPU time of one.
# The MALLOC settings keep freed memory in the process; without them every large tensor is page-faulted in anew.
export OMP_NUM_THREADS = 1
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 16000000000
export MALLOC_TOP_PAD_ = 268435456

.PHONY: demo test tiny bench clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/installed
	@echo "--- real text, continued"
	@$(RUN) sample.py --start="Return the name of the " --max_new_tokens=40
	@echo "--- facts in the prompt, asked in other words; every token with its tick and certainty"
	@printf '%s\n' "Fenlix works as a florist. Marvas works as a ranger. Fenlix keeps a trout. Keltin works as a grocer." \
	  "What work does Marvas have?" "What animal does Fenlix keep?" | $(RUN) sample.py --chat --show=ticks

test: .venv/installed
	$(RUN) -m pytest -q

tiny: .venv/installed
	$(RUN) data.py --train_vocab=2048 --tokenizer=out/tokenizer --out=data/tiny
	$(TRAIN) config/tiny_phase1.py
	$(TRAIN) config/tiny_phase2.py
	$(TRAIN) config/tiny_phase2.py --block=ffn --out_dir=out/tiny_ffn
	$(RUN) bench.py card

bench: .venv/installed
	$(RUN) bench.py quality

clean:
	rm -rf .venv out data
