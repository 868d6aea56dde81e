from value_models.training.train import run

raise SystemExit(run())
