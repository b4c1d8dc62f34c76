"""Does this machine compute what it should? The checks behind `tools/self_check.py`.

A group is a module with a generator `checks(settings)` of `Check`s. Each runs in a process of its own, see `groups.py`.
"""
