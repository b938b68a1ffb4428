"""The code behind train.py, eval.py and benchmark.py: parse, build, call the engine."""
