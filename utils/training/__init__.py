"""The parts of a training run, apart from its loop in train.py: the step and what it is made of, schedules, optimizers,
checkpoints, the record."""
