from value_models.study.run import main

raise SystemExit(main())
