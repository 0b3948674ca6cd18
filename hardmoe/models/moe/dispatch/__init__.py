"""Items to their experts and the experts' outputs back, in three ways that give the same numbers.

| dispatch | what it moves | what experts compute |
|---|---|---|
| `einsum` | products with one-hot tensors, quadratic in a group's size | all slots |
| `index` | one copy of each item that is kept | all slots |
| `grouped` | the same, sorted by expert | only slots that are taken |
"""
