"""The benchmark: homeloop side by side with its peers, in one run, on one machine.

`python -m bench` (or `make bench`). Each row is one job; its contenders do that job with different libraries.
Rounds of all contenders are interleaved, so that what disturbs the machine disturbs them alike. A ratio above
1 always means that homeloop is the better one.
"""
