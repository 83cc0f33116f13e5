"""The tiny block learns to be written to:
told in one session, asked in another, through the write itself.

    torchrun --nproc_per_node=2 train.py config/tiny_phase3.py
"""
phase = 3
base = "out/tiny_phase1/last"
graft = "out/tiny_phase2/last/graft.safetensors"
out_dir = "out/tiny_phase3"
tokenizer = "out/tokenizer"
text = "data/tiny"
text_share = 0.7
B = 8                       # per process
T = 256
ticks = 4
history = 8
sync = 768
nlm_hidden = 4
unet_step = 64
block_head_dim = 64
ask_every = 2
thinking_share = 0.75
full_share = 0.6            # the others are of text and chat alone
carry_share = 0.125
seed = 2
max_steps = 2000            # the Makefile goes on from 1,990, in four parts
teacher = True
ffn = "out/tiny_ffn/last/graft.safetensors"
crowd_facts = 1
episode_weight = 0.1        # their gradients are several times as large as those of text
locality_weight = 2.0
lr = 2e-3
min_lr = 2e-5
eval_interval = 500
dtype = "float32"
