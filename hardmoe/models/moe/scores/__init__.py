"""Items to one score per expert; a router makes its choice of these. All are computed in float32 at least, whatever autocast
says: bfloat16 has three digits, and near-ties would be decided by rounding.
"""
