from value_models.demo.recipe import main

raise SystemExit(main())
