"""Studies on the playground: methods × scenarios × seeds, from a plan to a page of tables.

    python -m playground.studies playground/studies/fedcmp.yaml --hours 3

plan.py cuts a plan into jobs, runner.py runs them, rows.py keeps a line for each, results.py looks
the rows up, tables.py and plots.py show them. A further study is a YAML file, a subclass of `Plan`
that says how a job is measured, a report that says which tables are shown, and a line in
registry.py.
"""
