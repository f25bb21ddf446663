"""What the tests are worth: faults planted one at a time in a copy of the tree, each with the tests that should fail.

``python -m benchmarks.mutants`` runs them all, ``--only PATTERN`` those whose name matches.
"""
