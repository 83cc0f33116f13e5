"""One thread for every test: on two busy cores, two OpenMP threads cost several times the CPU time of one."""
import torch

torch.set_num_threads(1)
