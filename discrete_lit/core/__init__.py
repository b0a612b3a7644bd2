"""The ground that everything stands on: randomness, ranks, files, images, provenance.

It imports nothing of the package.
"""
