"""The words of which needle keys are made: one adjective and one noun."""

ADJECTIVES = tuple(
    """amber ancient bitter blue bold brave bright broken calm clever cold copper crimson curious
    dark deep distant dusty eager early empty fancy fast fierce frozen gentle giant golden grand
    green grey happy heavy hidden hollow honest humble icy iron jolly kind large lazy light little
    lonely loud lucky lunar mellow mighty narrow noble old orange pale patient plain polar proud
    purple quick quiet rapid rare red restless rough royal rusty sacred scarlet secret sharp shiny
    silent silver simple sleepy slow smooth soft solar solid stormy strange strong sunny sweet swift
    tall tame tender tiny velvet violet warm white wild windy wise wooden yellow young""".split()
)

NOUNS = tuple(
    """anchor apple arrow badger bamboo banner barrel basket beacon bear bell bird bottle bridge
    bucket butter candle canyon castle cedar chair cherry circle cliff cloud clover coin compass
    coral crown desert diamond dolphin dragon eagle ember engine falcon feather ferry field flame
    flower forest fountain fox galaxy garden ginger glacier hammer harbor hawk honey horse island
    ivory jacket jungle kettle kitten ladder lantern lemon leopard lion lizard maple marble meadow
    mirror monkey moon mountain needle oak ocean olive orchid otter owl panther pearl pebble pepper
    pilot planet pony prairie rabbit raven river robin rocket saddle sailor shadow shell spider
    spring stone sugar temple thunder tiger tower tunnel turtle valley violin walnut whale willow
    window winter wizard wolf""".split()
)
