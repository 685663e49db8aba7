"""The default sweeper (one trajectory, one job) and the launchers of `conf/hydra/`; Hydra finds them beside `launch.py`."""
