"""Learning a value network from demonstrations: inverse value learning, arXiv 2410.21027."""


class TrainingError(ValueError):
    """Training cannot begin or go on: one line that says what is wrong and what to do."""
