"""What is said where a check has nothing to look at."""

ONE_PATH = "an ordinary module: its forward pass is its definition"
NO_WEIGHTS = "an ordinary module: it has no aggregation weights"
NOT_CAUSAL = "not causal"
NO_SEQUENCE = "no sequence"
NO_SOFTMAX = "no softmax"
MORE_THAN_A_SOFTMAX = "more than a softmax"
NOT_APPLICABLE = (ONE_PATH, NO_WEIGHTS, NOT_CAUSAL, NO_SEQUENCE, NO_SOFTMAX, MORE_THAN_A_SOFTMAX)
