"""The CTM block learns to think in the last layer of the tiny backbone:
first imitation of an FFN, then the tick loss.

    torchrun --nproc_per_node=2 train.py config/tiny_phase2.py
    torchrun --nproc_per_node=2 train.py config/tiny_phase2.py \
        --block=ffn --teacher=False --ffn= --imitation_steps=0 --max_steps=6220 \
        --lr=2e-3 --min_lr=1e-4 --out_dir=out/tiny_ffn  # before it: the control, its teacher
"""
phase = 2
base = "out/tiny_phase1/last"
out_dir = "out/tiny_phase2"
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
thinking_share = 0.75       # 192 of 256
max_steps = 1400
teacher = True              # the text, and what this FFN would say, half and half
ffn = "out/tiny_ffn/last/graft.safetensors"
imitation_steps = 800
lr = 5e-3
min_lr = 1e-3               # phase 3 goes on from here
eval_interval = 400
dtype = "float32"
