"""The block of Qwen3-0.6B learns to carry its thinking and to be written to:
documents cut in four, and dialogues. One RTX 5090 (32 GB).

    python train.py config/phase3.py --dry_run=True
    python train.py config/phase3.py
"""
phase = 3
base = "Qwen/Qwen3-0.6B"
graft = "out/phase2/last/graft.safetensors"
out_dir = "out/phase3"
tokenizer = "Qwen/Qwen3-0.6B"
text = "data/qwen"
text_share = 0.7
B = 2
T = 1024
carry_rows = 1
document_write = True
teacher = True
accumulation = 4
episode_facts = 64
carry_facts = 16
ticks = 32
history = 16
sync = 512
nlm_hidden = 32
unet_step = 128
block_head_dim = 128
thinking_share = 0.5
max_steps = 10000
warmup_steps = 500
lr = 2e-4
min_lr = 2e-5
checkpoint_ticks = True
compile = True
eval_interval = 500
eval_rows = 8
session_rows = 1024         # a million tokens
