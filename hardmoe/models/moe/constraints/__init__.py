"""Hard constraints: experts that were used too much sit out. Their state lies in registered buffers, so that a training that was
killed goes on as it was; in the released code of the paper it is a plain attribute, which a checkpoint loses.
"""
