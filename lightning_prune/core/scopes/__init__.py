"""Who competes with whom: scores of groups and a sparsity -> masks of groups.

Each scope keeps a number of groups that follows from shapes and sparsity alone, exactly; among equal scores the
lower (parameter, index) is kept; and where the scores stay as they are, the mask of a larger sparsity lies inside
that of a smaller one. Scores may be lazy (`types.Scores`): a scope holds those of one parameter at a time.

`rankings` compare scores, `allocations` decide first how many each parameter keeps, `patterns` where they lie.
"""
