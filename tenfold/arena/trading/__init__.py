"""A market in which a late answer trades at a worse price (specification of the arenas, section 7.2).

Three kinds: `synthetic` is drawn from a seed and has a closed form, `replay` plays the user's own bars or quotes
without looking ahead, and `paper` keeps the published rules, which do look ahead, for comparison. All of them simulate
a market that does not react to its traders: what is earned in them says nothing about what would be earned elsewhere.

>>> from tenfold.arena.trading.agents import ScriptedTrader
>>> from tenfold.arena.trading.market_day import play_market
>>> quick, slow = ScriptedTrader(0.9, seconds=0.2, name="quick"), ScriptedTrader(0.9, seconds=1.2, name="slow")
>>> day = play_market([quick, slow], seed=0)
>>> {name: f"{value:+.1%}" for name, value in day.yields.items()}
{'quick': '+2.9%', 'slow': '-0.3%'}
"""
