"""The scoreboard: methods, controls, measured rows, tables and pages."""
