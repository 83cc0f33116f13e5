"""Qwen3-0.6B brings its own language: phase 1 is a download. This config only says so, and checks the shape.

    python train.py config/phase1.py --dry_run=True
"""
phase = 1
out_dir = "out/phase1"
tokenizer = "Qwen/Qwen3-0.6B"
