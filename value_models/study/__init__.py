"""How well value networks carry a skill to other targets: the published questions, asked of the
demo family (Lu et al., NAACL 2025, arXiv 2410.21027). `make study` reruns it; docs/study.md tells
what came out.
"""
