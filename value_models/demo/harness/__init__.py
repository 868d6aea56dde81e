"""Tasks over the demo's atlas for EleutherAI's lm-eval, and what transformers scores on them.

`atlas_choice` compares log-likelihoods, `atlas_answer` generates. The folder is not called lm_eval,
which is the name of the harness's own package.
"""
