"""Many runs: planned, launched, watched, started again. Nothing here imports torch; all of it reads and writes small files."""
