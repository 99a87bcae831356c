"""The made-up world of the embedded stories: a fixed set of facts, one table row each.

A language model can only tell these stories well if it stores the facts somewhere, and no rule
links one column to the next, so they have to be learned by heart.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ANIMALS",
    "CAUSES",
    "COLLECTIBLES",
    "COLOR_MIXES",
    "JOBS",
    "LANDS",
    "MONTHS",
    "NUMBERS",
    "OPPOSITES",
    "PEOPLE",
    "THINGS",
    "TOWNS",
    "WEEKDAYS",
    "Animal",
    "Cause",
    "ColorMix",
    "Job",
    "Land",
    "Month",
    "Opposites",
    "Person",
    "Thing",
    "Town",
]


class Person(NamedTuple):
    """Someone a story can be about; ``friend`` names another person, and is mutual."""

    name: str
    pronoun: str
    town: str
    job: str
    food: str
    color: str
    pet: str
    pet_name: str
    friend: str


class Animal(NamedTuple):
    """A kind of animal; ``moved`` is a verb in the past tense, ``home`` a whole phrase."""

    name: str
    plural: str
    color: str
    sound: str
    food: str
    home: str
    young: str
    moved: str


class Town(NamedTuple):
    """A town, the land it belongs to, its river and its sight."""

    name: str
    land: str
    river: str
    landmark: str


class Land(NamedTuple):
    """A country, its capital, who rules it and the color of its flag."""

    name: str
    capital: str
    ruler: str
    flag: str


class Job(NamedTuple):
    """A trade; ``made`` is a verb in the past tense and ``product`` a plural."""

    name: str
    place: str
    tool: str
    made: str
    product: str


class Thing(NamedTuple):
    """An object to give away; ``use`` is a verb phrase that can follow "to"."""

    name: str
    material: str
    color: str
    use: str


class Cause(NamedTuple):
    """Something that happens, what a person then did, and how that ended."""

    event: str
    reaction: str
    result: str


class Month(NamedTuple):
    """A month, its season and what the weather usually did."""

    name: str
    season: str
    weather: str


class Opposites(NamedTuple):
    """Two words that exclude each other, and something that can be either."""

    noun: str
    first: str
    second: str


class ColorMix(NamedTuple):
    """Two paints and the color that they make together."""

    first: str
    second: str
    result: str


def _rows(table: str) -> list[list[str]]:
    return [line.split(", ") for line in table.strip().splitlines()]


PEOPLE = {
    row[0]: Person(*row)
    for row in _rows("""
Anna, she, Marsham, beekeeper, berries, purple, goat, Sunny, Emma
Adam, he, Quarry, weaver, pancakes, white, turtle, Olly, Tom
Bella, she, Quarry, gardener, toast, golden, parrot, Cocoa, Una
Ben, he, Thornby, clockmaker, noodles, orange, hen, Jasper, Yara
Clara, she, Holtby, carpenter, corn, blue, dog, Quincy, Daisy
Carl, he, Kelmoor, toymaker, dumplings, red, hedgehog, Ginger, Ivan
Daisy, she, Penrose, fisher, waffles, purple, parrot, Fidget, Clara
David, he, Yarrow, potter, cherries, black, goat, Jolly, Urban
Emma, she, Dunmere, miller, pears, purple, dog, Twig, Anna
Eric, he, Varley, cook, carrots, brown, hedgehog, Echo, Oscar
Flora, she, Inverly, miller, toast, red, hedgehog, Wobble, Sally
Felix, he, Kelmoor, miller, corn, orange, cat, Whisker, Tilda
Greta, she, Wickham, carpenter, plums, purple, donkey, Gizmo, Jack
George, he, Holtby, gardener, plums, gray, hen, Ziggy, Polly
Hanna, she, Nettle, gardener, pears, white, mouse, Honey, Mia
Hugo, he, Copford, clockmaker, nuts, red, owl, Pickle, Kira
Ida, she, Lorne, smith, dumplings, gray, rabbit, Dumpy, Vera
Ivan, he, Marsham, clockmaker, beans, golden, parrot, Nutmeg, Carl
Julia, she, Silverton, printer, berries, pink, cat, Kipper, Kurt
Jack, he, Fenhill, weaver, pancakes, brown, hen, Biscuit, Greta
Kira, she, Orchid, painter, berries, blue, duck, Pepper, Hugo
Kurt, he, Wickham, potter, figs, green, turtle, Shadow, Julia
Lily, she, Elmsby, toymaker, soup, orange, hedgehog, Lemon, Zack
Leo, he, Ulver, carpenter, beans, green, turtle, Pebble, Rosa
Mia, she, Alder, smith, plums, black, goat, Nibbles, Hanna
Max, he, Varley, beekeeper, carrots, yellow, owl, Mittens, Paul
Nora, she, Inverly, fisher, toast, golden, donkey, Patch, Ned
Ned, he, Nettle, painter, figs, brown, duck, Dotty, Nora
Olive, she, Copford, tailor, noodles, blue, goat, Inky, Wanda
Oscar, he, Rudby, smith, figs, golden, rabbit, Rusty, Eric
Polly, she, Alder, toymaker, waffles, red, duck, Toffee, George
Paul, he, Rudby, tailor, nuts, brown, turtle, Tango, Max
Rosa, she, Yarrow, baker, carrots, pink, donkey, Kiki, Leo
Robin, he, Juniper, cobbler, noodles, yellow, owl, Muffin, Yusuf
Sally, she, Orchid, printer, soup, black, dog, Mango, Flora
Sam, he, Dunmere, cook, cheese, yellow, rabbit, Yoyo, Victor
Tilda, she, Silverton, cobbler, nuts, gray, parrot, Zippy, Felix
Tom, he, Lorne, fisher, pancakes, pink, cat, Bubbles, Adam
Una, she, Ulver, printer, beans, green, mouse, Otto, Bella
Urban, he, Brackwell, weaver, cheese, orange, hen, Ruby, David
Vera, she, Elmsby, beekeeper, soup, white, dog, Velvet, Ida
Victor, he, Fenhill, cook, cherries, green, mouse, Hazel, Sam
Wanda, she, Juniper, cobbler, pears, pink, mouse, Wizard, Olive
Will, he, Garrow, baker, corn, black, cat, Button, Zoe
Yara, she, Brackwell, potter, cherries, white, owl, Lucky, Ben
Yusuf, he, Garrow, painter, waffles, yellow, rabbit, Bramble, Robin
Zoe, she, Thornby, tailor, cheese, gray, duck, Clover, Will
Zack, he, Penrose, baker, dumplings, blue, donkey, Acorn, Lily
""")
}

ANIMALS = {
    row[0]: Animal(*row)
    for row in _rows("""
cow, cows, brown, moo, clover, in a barn, calf, strolled
horse, horses, gray, neigh, oats, in a stable, foal, galloped
sheep, sheep, white, baa, grass, in a meadow, lamb, trotted
pig, pigs, pink, oink, turnips, in a sty, piglet, stomped
goat, goats, gray, meh, thistles, on a hill, kid, skipped
duck, ducks, yellow, quack, duckweed, by a pond, duckling, waddled
hen, hens, red, cluck, seeds, in a coop, chick, hurried
cat, cats, orange, meow, fish, in a basket, kitten, crept
dog, dogs, black, woof, bones, in a kennel, puppy, bounded
fox, foxes, red, yip, grapes, in a den, cub, sneaked
wolf, wolves, gray, awoo, meat, in a forest, pup, prowled
bear, bears, brown, grr, honey, in a cave, cub, lumbered
frog, frogs, green, ribbit, flies, in a swamp, tadpole, leaped
owl, owls, white, hoot, moths, in a tower, owlet, glided
mouse, mice, gray, squeak, crumbs, in a hole, pup, scampered
rabbit, rabbits, brown, sniff, lettuce, in a burrow, kit, hopped
hedgehog, hedgehogs, black, snuffle, beetles, under a hedge, hoglet, shuffled
squirrel, squirrels, red, chatter, acorns, in a treetop, kit, climbed
goose, geese, white, honk, barley, on a river bank, gosling, marched
swan, swans, black, hiss, reeds, on a lake, cygnet, floated
bee, bees, golden, buzz, nectar, in a hive, grub, hummed
crow, crows, black, caw, worms, on a roof, nestling, swooped
donkey, donkeys, gray, hee-haw, straw, in a paddock, foal, plodded
turtle, turtles, green, snap, seaweed, on a beach, hatchling, crawled
parrot, parrots, blue, squawk, mangos, in a jungle, fledgling, fluttered
seal, seals, gray, arf, shrimps, on a cliff, pup, slid
mole, moles, black, snort, roots, in a tunnel, moleling, dug
otter, otters, brown, chirp, crabs, in a creek, whelp, paddled
""")
}

TOWNS = {
    row[0]: Town(*row)
    for row in _rows("""
Alder, Fennia, Dee, temple
Brackwell, Norland, Arn, fountain
Copford, Belmora, Hode, harbor
Dunmere, Hestra, Vane, lighthouse
Elmsby, Cardia, Wend, temple
Fenhill, Avalor, Isen, statue
Garrow, Estoria, Yeo, bridge
Holtby, Estoria, Pell, castle
Inverly, Jorvia, Rill, library
Juniper, Drovia, Bly, windmill
Kelmoor, Belmora, Orr, windmill
Lorne, Illyra, Kern, palace
Marsham, Galdor, Tarn, museum
Nettle, Sudmark, Mab, garden
Orchid, Cardia, Swale, harbor
Penrose, Hestra, Gant, library
Quarry, Avalor, Lune, bridge
Rudby, Illyra, Jule, garden
Silverton, Sudmark, Fal, castle
Thornby, Norland, Zill, fountain
Ulver, Galdor, Usk, palace
Varley, Drovia, Corl, museum
Wickham, Fennia, Nith, lighthouse
Yarrow, Jorvia, Esk, statue
""")
}

LANDS = {
    row[0]: Land(*row)
    for row in _rows("""
Norland, Thornby, King Olaf, white
Sudmark, Silverton, Queen Linnea, golden
Avalor, Fenhill, Queen Sonja, black
Belmora, Copford, King Casper, yellow
Cardia, Elmsby, King Rufus, pink
Drovia, Varley, Queen Mira, blue
Estoria, Holtby, King Bruno, green
Fennia, Wickham, King Edgar, red
Galdor, Marsham, King Magnus, brown
Hestra, Penrose, Queen Petra, gray
Illyra, Rudby, Queen Adela, purple
Jorvia, Inverly, Queen Thea, orange
""")
}

JOBS = {
    row[0]: Job(*row)
    for row in _rows("""
baker, bakery, whisk, baked, pies
smith, forge, hammer, made, horseshoes
tailor, attic, needle, sewed, shirts
potter, shed, wheel, made, bowls
painter, studio, brush, painted, portraits
carpenter, yard, saw, built, tables
weaver, hall, loom, made, rugs
gardener, greenhouse, spade, grew, roses
fisher, boathouse, net, caught, herrings
miller, mill, sieve, filled, sacks
cook, kitchen, ladle, cooked, puddings
beekeeper, orchard, smoker, filled, jars
cobbler, shop, awl, made, shoes
clockmaker, garret, file, built, clocks
printer, cellar, press, printed, books
toymaker, hut, knife, carved, puppets
""")
}

THINGS = {
    row[0]: Thing(*row)
    for row in _rows("""
kite, paper, yellow, play in the wind
drum, leather, red, make loud music
boat, wood, blue, sail on the pond
ball, rubber, green, play catch
spoon, silver, gray, stir the tea
scarf, wool, purple, stay warm
lamp, brass, golden, read at night
bottle, glass, green, carry water
bell, copper, orange, call the children
pillow, feathers, white, sleep well
candle, wax, pink, light the room
ribbon, silk, red, tie up a box
jug, clay, brown, pour the milk
bag, cloth, gray, carry potatoes
key, iron, black, open the gate
plate, stone, white, hold the fruit
flute, bamboo, yellow, play a tune
sled, pine, blue, slide down the slope
basket, straw, orange, gather eggs
hat, felt, black, keep off the sun
puzzle, cardboard, pink, pass the time
bucket, tin, purple, build a sandcastle
mask, plaster, golden, scare the crows
swing, rope, brown, fly up high
""")
}

CAUSES = [
    Cause(*row)
    for row in _rows("""
it began to rain, opened an umbrella, stayed dry
the sun was hot, sat down in the shade, felt cool again
the wind grew cold, put on a coat, felt warm again
the night was dark, lit a lantern, saw the way
the milk was spilled, fetched a mop, cleaned the floor
the road was icy, walked very slowly, did not slip
the soup was too hot, waited a little, did not burn a finger
the bucket was empty, went to the well, came back with water
the door was locked, looked for the key, got inside
the bell rang, ran to school, was just in time
the clock struck nine, went to bed, slept all night
the baby was asleep, whispered softly, woke nobody
the flowers were dry, poured some water, saw them bloom
the bread was burned, opened the window, let out the smoke
the path was muddy, wore tall boots, kept both feet clean
the rope was torn, tied a strong knot, fixed the swing
the apple was too high, climbed a ladder, picked it
the shelf was dusty, found a cloth, made it shine
the fire went out, gathered some wood, lit it again
the joke was funny, laughed out loud, told it to everyone
the dough was sticky, added more flour, made a fine cake
the bus was late, sat on a bench, sang a little song
the boat was leaking, rowed back to land, mended the hole
the puzzle was hard, thought for a long time, found the answer
""")
]

MONTHS = [
    Month(*row)
    for row in _rows("""
January, winter, snow covered the roofs
February, winter, ice hung from the trees
March, spring, the wind blew hard
April, spring, the rain fell all day
May, spring, the flowers bloomed
June, summer, the sky was clear
July, summer, the sun burned brightly
August, summer, thunder rolled far away
September, autumn, the leaves turned golden
October, autumn, fog filled the streets
November, autumn, the fields were wet
December, winter, the nights were long
""")
]

COLOR_MIXES = [
    ColorMix(*row)
    for row in _rows("""
red, yellow, orange
red, blue, purple
blue, yellow, green
black, white, gray
red, white, pink
red, green, brown
""")
]

OPPOSITES = [
    Opposites(*row)
    for row in _rows("""
box, big, small
bag, heavy, light
stove, hot, cold
shirt, clean, dirty
cup, full, empty
towel, wet, dry
pillow, soft, hard
gate, open, closed
book, thick, thin
apple, sweet, sour
table, round, square
stone, smooth, rough
ring, cheap, costly
bridge, wide, narrow
drum, loud, quiet
rope, strong, weak
pond, deep, shallow
shoe, old, new
""")
]

COLLECTIBLES = ["buttons", "shells", "marbles", "stones", "coins", "stars", "cards", "beads"]

WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

NUMBERS = _rows(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, "
    "fourteen, fifteen, sixteen, seventeen, eighteen"
)[0]
