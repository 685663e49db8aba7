"""What methods share that train something beforehand: one trainer for all, MEND's editor network, files of what was trained."""
