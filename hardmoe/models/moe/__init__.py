"""Mixture-of-experts layers inside a network: every item (a patch, a pixel, an image) through a few of a layer's experts.

Five kinds of small pieces, each a class in a file of its own, that know of each other only what `routing` says:

    scores/        items to one number per expert: linear, cosine, distance, or of whole images, pooled or convolved
    routers/       numbers to a `Routing`: who goes where, in which slot, with which weight; and the auxiliary losses
    constraints/   which experts are out of the next batch, so that none is used too much (hard constraints)
    dispatch/      items to experts and back: einsum (to be read), index, grouped
    experts/       what runs on the items: stacked MLPs, or whole modules such as residual stages and convolutions

`layer.MoeLayer` puts one of each together. Rejected: a layer class per paper, which is how released code came to have the same
router three times with three mistakes.
"""
