# make demo    three facts are told, the process ends, another one is asked (also of a stranger); and facts in the prompt, thought about aloud
# make test    the test suite, in a virtual environment of its own
# make tiny    train the tiny model from nothing: tokenizer, phases 1 to 3 and the control
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

DEMO := out/demo_memory
ASK = for question in "What work does Fenlix have?" "What animal does Marvas keep?" "What city does Keltin live in?" \
      "What city does Kelvin live in?"; do \
      $(RUN) sample.py --chat --start="$$question" $(1) | grep -v "^(kept"; done

demo: .venv/installed
	@rm -rf $(DEMO)
	@echo "--- one process is told three facts, writes what surprised it into its weights, and ends"
	@$(RUN) sample.py --memory on --memory_dir=$(DEMO) --start="Fenlix works as a florist. Marvas keeps a trout. Keltin lives in Quito."
	@echo "--- new processes are asked in other words; they have the weights and nothing else"
	@$(call ASK,--memory read-only --memory_dir=$(DEMO))
	@echo "--- the same with the memory off"
	@$(call ASK,--memory off)
	@echo "--- real text, continued"
	@$(RUN) sample.py --start="Return the name of the " --max_new_tokens=40 --temperature=0.8 --top_k=40
	@echo "--- facts in the prompt; every token with its tick and certainty"
	@printf '%s\n' "Fenlix works as a florist. Marvas works as a ranger. Fenlix keeps a trout." "What work does Marvas have?" \
	  | $(RUN) sample.py --chat --show=ticks

test: .venv/installed
	$(RUN) -m pytest -q -n 2 --dist=loadfile

# a part of phase 3: from which folder of out/, to which; SLOWLY: as it is near its end, all of the text thought about
# (what a session says, session_proj, is measured at the end of the last one alone)
PART = $(TRAIN) config/tiny_phase3.py --device=cpu --graft=out/$(1)/last/graft.safetensors --out_dir=out/$(2)
SLOWLY = --thinking_share=1 --warmup_steps=30 --min_lr=1e-5

tiny: .venv/installed
	$(RUN) data.py --train_vocab=2048 --tokenizer=out/tokenizer --out=data/tiny
	$(TRAIN) config/tiny_phase1.py --device=cpu
	$(TRAIN) config/tiny_phase2.py --device=cpu --block=ffn --teacher=False --ffn= --out_dir=out/tiny_ffn --imitation_steps=0 --max_steps=6220 --lr=2e-3 --min_lr=1e-4
	$(TRAIN) config/tiny_phase2.py --device=cpu
	$(call PART,tiny_phase2,tiny_phase3_1) --stop_at=1990
	$(call PART,tiny_phase3_1,tiny_phase3_2) --max_steps=1000 --stop_at=990 --lr=8e-4 --warmup_steps=50 --seed=3 --thinking_share=0.375 --full_share=1 --episode_weight=0.4
	$(call PART,tiny_phase3_2,tiny_phase3_3) $(SLOWLY) --max_steps=600 --stop_at=590 --lr=8e-4 --seed=5 --full_share=0.8 --episode_weight=0.06 --locality_weight=3 --baseline_rate=0.0027 --input_ridge=0.01
	$(call PART,tiny_phase3_3,tiny_phase3_4) $(SLOWLY) --max_steps=950 --lr=4e-4 --seed=6 --full_share=1 --episode_weight=0.3 --locality_weight=3 --baseline_rate=0.0015 --session_rows=0
	$(call PART,tiny_phase3_4,tiny_phase3) $(SLOWLY) --max_steps=300 --lr=1e-3 --seed=7 --keep_due=3e-4 --input_ridge=1e-3 --carry_share=0 --text_cost=0.0047
	$(RUN) bench.py card

bench: .venv/installed
	$(RUN) bench.py quality
	$(RUN) bench.py memory
	$(RUN) bench.py endurance

clean:
	rm -rf .venv out data
