"""The paper's tables: methods by seeds, run where they are missing, and written down.

``job`` is what ``tools/reproduce.py`` does. ``seed`` runs the stages of one seed in a tiny world and evaluates its
students; ``pool`` runs seeds side by side; ``chain`` makes jobs of a cluster of them instead; ``scores`` and
``significance`` are the arithmetic, ``tables`` the form.
"""
