"""Instruments: what a model computes, what it costs, what it looks at."""
