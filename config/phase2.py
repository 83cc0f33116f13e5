"""The CTM block learns to think in the last layer of a frozen Qwen3-0.6B. One RTX 5090 (32 GB).

    python data.py --source=hub:HuggingFaceFW/fineweb-edu --limit=200000 \
        --tokenizer=Qwen/Qwen3-0.6B --out=data/qwen
    python train.py config/phase2.py --dry_run=True
    python train.py config/phase2.py
"""
phase = 2
base = "Qwen/Qwen3-0.6B"
out_dir = "out/phase2"
tokenizer = "Qwen/Qwen3-0.6B"
text = "data/qwen"
text_share = 0.7
B = 2
T = 2048
accumulation = 2
ticks = 32
history = 16
sync = 512
nlm_hidden = 32
unet_step = 128
block_head_dim = 128
max_steps = 20000
imitation_steps = 1000
warmup_steps = 500
lr = 3e-4
min_lr = 3e-5
checkpoint_ticks = True
compile = True
eval_interval = 500
eval_rows = 8
