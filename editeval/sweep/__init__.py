"""Many runs: planned, launched, watched, started again; all of it reads and writes small files.

plan, records, status, session and source do not import torch.
"""
