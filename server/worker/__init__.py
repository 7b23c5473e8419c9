"""The worker: takes jobs from the queue and feeds their units to a gang of ranks.

It never imports torch; only the ranks, its child processes, do.
"""
