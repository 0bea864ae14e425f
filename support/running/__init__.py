"""How a program runs: messages, processes, files, hyperparameters, flags. Knows no model."""
