"""Qwen3-0.6B brings its own language:
phase 1 loads its pretrained weights and measures what phase 2 builds on.

    python data.py --source=hub:HuggingFaceFW/fineweb-edu --limit=200000 \
        --tokenizer=Qwen/Qwen3-0.6B --out=data/qwen
    python train.py config/phase1.py        # held-out nats and in-context recall; no step is taken
"""
phase = 1
base = "Qwen/Qwen3-0.6B"
out_dir = "out/phase1"
tokenizer = "Qwen/Qwen3-0.6B"
text = "data/qwen"
B = 2
T = 2048
max_steps = 0
eval_rows = 16
