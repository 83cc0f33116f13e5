"""The small backbone learns language and in-context facts from nothing.
Two CPU cores: see the card in weights/.

    torchrun --nproc_per_node=2 train.py config/tiny_phase1.py
"""
phase = 1
out_dir = "out/tiny_phase1"
tokenizer = "out/tokenizer"
text = "data/tiny"
text_share = 0.2
told_share = 0.1
curriculum = 1000
B = 8                       # per process: 2 x 8 x 256 tokens a step
T = 256
max_steps = 6400
lr = 3e-3
min_lr = 1e-4
eval_interval = 300
