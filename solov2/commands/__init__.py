"""The commands behind `solov2`, train.py, eval.py and benchmark.py: parse, call the library, return an exit code."""
