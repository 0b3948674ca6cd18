"""Objects found on canvases: a set made of any source's images, detectors with and without experts, what they are worth.

Like `bulk`, this has roots of its own and stands above the families of a mixture, whose bootstrap it uses.
"""
