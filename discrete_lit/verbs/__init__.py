"""The verbs of the `discrete-lit` command beside Lightning's own: one typed function a file."""
