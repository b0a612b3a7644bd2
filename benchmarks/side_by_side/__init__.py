"""What the benchmarks share: arms that take turns in one run, their ratios, and the limits of the machine.

The arms of a comparison alternate, so that they meet the same state of the machine. Wall clocks say what a user waits
for; the processor time of the process stands beside them, which other programs disturb less.
"""
