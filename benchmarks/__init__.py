"""What measures this package from outside: the results table, the stopwatch, and the tables of README and docs/.

None of it is installed. From a checkout: `python -m benchmarks.table`, `python -m benchmarks.stopwatch`,
`python -m benchmarks.render`.
"""
