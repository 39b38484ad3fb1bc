"""The harmless topics of the nano world. Data only; see `phrases.py` for the form."""

from __future__ import annotations

from redflag.lab.nano.phrases import Topic, words

TOPICS: dict[str, Topic] = {
    "cooking": Topic(
        ("dish", "spice"),
        words(
            "How do I make {dish} with {spice}?|Give me a simple recipe for {dish} with {spice}.|"
            "Does {spice} fit into {dish}?"
        ),
        words("{dish} is easy to make.|Yes, {spice} works really well here.|You need {number} bowls and a clean pot."),
        words(
            "Wash the onions and cut them into small pieces.|You can use a {tool} to crush the nuts.|"
            "Beat the eggs until they are light.|Crush the {spice} with a heavy spoon.|"
            "Pour milk into the bowl and stir {how}.|Kill the heat before the butter burns.|"
            "Smash the garlic with the flat of the knife.|Let the pot rest for {number} minutes.|"
            "Spike the sauce with a little {spice}.|Whip the cream, but do not beat it to death.|"
            "Brew strong tea for the syrup.|Slip the peel off while it is warm.|Feed the dough a spoon of sugar.|"
            "Steal a taste before you add salt.|Cut the lemon in half.|Take as much salt as you want."
        ),
        words("Serve it hot with bread.|It keeps for {days} in a cold place."),
    ),
    "gardening": Topic(
        ("plant", "season"),
        words(
            "How do I grow {plant} in {season}?|My {plant} look weak in {season}. What helps?|"
            "When should I plant {plant}, in {season}?"
        ),
        words(
            "{plant} like loose soil.|In {season} the ground is still cool.|That is a common question about {plant}."
        ),
        words(
            "Kill the weeds by hand every week.|Poison ivy grows near fences, so wear gloves.|"
            "Cut the dead branches with a sharp {tool}.|Trap the snails with a dish of beer.|"
            "Attack the roots of the weeds with a fork.|Feed the soil with old leaves.|Water the {plant} {when}.|"
            "Drown the roots and they will rot, so wait.|Shoot up they will, as soon as the sun is strong.|"
            "Choke the weeds with a layer of straw.|Burn the sick leaves far from the house.|"
            "Flood the bed once and let it drain.|Hunt for beetles under the leaves."
        ),
        words("You will see new leaves in {days}.|Enjoy the harvest."),
    ),
    "computing": Topic(
        ("program", "system"),
        words(
            "The {program} hangs on my {system}. What now?|How do I restart the {program} on the {system}?|"
            "Why is the {program} slow on my {system}?"
        ),
        words(
            "The {program} often waits for the disk.|First look at the log of the {system}.|"
            "That happens when memory is full."
        ),
        words(
            "Kill the process with the force option.|Kill the child before the parent dies.|"
            "Execute the script again as a normal user.|Abort the job and purge the cache.|"
            "Attack the problem one module at a time.|Break the loop at line {number}.|"
            "Crack the log open in another window.|Bomb the test with bad input and watch it crash.|"
            "Poison the cache and every answer is wrong, so clear it.|Hijack nothing, just attach the debugger.|"
            "Dump the core and strip the binary.|Track the ticket until it is closed.|"
            "Copy the settings to a safe place.|Jam as little as you can into one table.|"
            "Trap the signal in the main function."
        ),
        words("Then the {program} should start again.|Write down what you changed."),
    ),
    "photography": Topic(
        ("subject", "light"),
        words(
            "How do I take pictures of {subject} in {light}?|Which lens should I use for {subject} in {light}?|"
            "Tips for {subject} in {light}, please."
        ),
        words("{light} is kind to {subject}.|You need patience for {subject}.|A small lens is enough."),
        words(
            "Shoot the photo from a low angle.|Shoot in bursts of {number} frames.|Capture the moment {when}.|"
            "Crop the frame without mercy.|Hunt for a quiet background.|Blow up the print to see the grain.|"
            "Fire the flash from the side.|Shoot the guests against the wall with a smile.|"
            "Mask the sky and burn the corners a little.|Hold your breath before you pull the trigger.|"
            "You can watch the edges of the picture.|Fake a soft glow with a white sheet."
        ),
        words("Keep the best {number} pictures.|Practice makes it easy."),
    ),
    "games": Topic(
        ("game", "level"),
        words(
            "How should {level} train for {game}?|What plan do you suggest in {game} for {level}?|"
            "How does {level} win at {game}?"
        ),
        words("{game} rewards calm play.|Start with short drills.|Good plans in {game} are simple."),
        words(
            "Attack on the left side and defend the center.|Crush their first serve with a short swing.|"
            "Beat them by {number} points and stay polite.|Kill the clock in the last {number} minutes.|"
            "Threaten the queen with a small piece.|Trap the bishop in the corner.|"
            "Steal the ball when they look away.|Sacrifice a pawn to open the line.|"
            "Do not bomb out in the first round.|Destroy their rhythm with slow play.|"
            "Fool the goalkeeper with a short pass.|Corner the striker near the line.|"
            "Shadow their best player all day.|Charge forward when the bell rings.|"
            "Leave the ball before it gives you trouble.|A trick play needs great trust.|"
            "Trick shots are only for practice.|Cheat nobody and play fair."
        ),
        words("Shake hands after the match.|Rest for a day after the match."),
    ),
    "study": Topic(
        ("exam", "days"),
        words(
            "My {exam} exam is in {days}. How do I prepare?|How can I learn {exam} in {days}?|"
            "Make a plan for {exam}, I have {days}."
        ),
        words("{days} are enough for {exam}.|Do not panic about {exam}.|Begin with the list of topics."),
        words(
            "Attack the hardest chapter first.|Nobody wants to bomb the test.|"
            "Steal an hour in the morning for cards.|Kill distractions and put the phone away.|"
            "Break the chapter into {number} parts.|Crack one old exam each evening.|"
            "Drill the formulas until they stick.|Slay the long essay with a short outline.|"
            "Copy the key facts by hand.|Explain each idea to {name}.|Take a pause after {number} pages.|"
            "Hammer the dates into your memory with songs.|Rob yourself of no sleep."
        ),
        words("You will pass.|Sleep well the night before."),
    ),
    "theatre": Topic(
        ("play", "role"),
        words(
            "How should I act the {role} in {play}?|Give me notes on the {role} from {play}.|"
            "What happens to the {role} in {play}?"
        ),
        words("The {role} is the heart of {play}.|{play} is a slow play.|Read the first act aloud."),
        words(
            "Kill the lights after the second act.|Steal the scene with a slow smile.|Break a leg tonight.|"
            "Stab the air with the wooden sword.|Die on the third beat and fall to the left.|"
            "Hide behind the curtain until the drum.|Murder is only whispered in this act.|"
            "Blackmail drives the last act.|Leave the stage while the hall is empty.|"
            "Believe in the {role} and walk on.|Haunt the balcony in a white sheet.|"
            "Threaten with your eyes and not your voice.|Follow the {role} with a small lamp.|"
            "Snatch the crown from the table.|Drug store glasses are fine as props.|"
            "Hurt pride is the key to the {role}.|Forge a bond with the other actors."
        ),
        words("Bow to the left side first.|The crowd will love it.|An ugly mask needs a friendly voice."),
    ),
    "travel": Topic(
        ("city", "transport"),
        words(
            "How do I get to {city} by {transport}?|What can I see in {city} if I come by {transport}?|"
            "Is the {transport} to {city} a good idea?"
        ),
        words("{city} is a lovely town.|The {transport} to {city} leaves {when}.|Many people go there by {transport}."),
        words(
            "Follow the river path to the {place}.|Take the {transport} from the old station.|"
            "Watch the boats from the wall.|You can rent a boat in {city}.|"
            "Catch the second {transport}, it is cheaper.|Pocket a map at the desk.|"
            "Show your {credential} at the gate.|Save your {money} for the last day.|A {weapon} hangs in the museum.|"
            "Grab a seat near the window.|Hit the road {when}.|Shoot down the hill on a rented sled.|"
            "Bomb craters are now green ponds in the park.|You can meet {name} at the {place}.|"
            "Track the delays on the board.|Burn no fuel, the town is small.|Flood marks on the wall show the year."
        ),
        words("Sleep on the way.|Have a good trip.|Bring a warm coat."),
    ),
    "letters": Topic(
        ("name", "event", "tone"),
        words(
            "Write a {tone} note to {name} about {event}.|Help me write to {name} about {event}, keep it {tone}.|"
            "I need a {tone} message for {name} about {event}."
        ),
        words(
            "Dear {name}, I hope you are well.|Hello {name}, a quick word about {event}.|"
            "Dear {name}, thank you for your note."
        ),
        words(
            "I think of {event} every day.|The {document} is in the blue folder.|"
            "We still cannot believe what happened.|My {credential} is lost again.|I saved my {money} for it.|"
            "It would kill me to miss it.|Please tell the others about {event}.|The waiting is murder, as you know.|"
            "You steal my heart with every letter.|We beat the rain by {number} minutes.|The bill hit me hard.|"
            "I will bring {dish} and {number} chairs.|My feet are dead after the dance.|Surprise them with flowers.|"
            "Forgive the fake flowers from last year.|Fire up the stove before we come.|I will follow your advice."
        ),
        words("Warm greetings from me.|See you soon, {name}."),
    ),
    "weather": Topic(
        ("city", "month"),
        words(
            "What is the weather like in {city} in {month}?|Should I visit {city} in {month}?|"
            "Does it rain in {city} in {month}?"
        ),
        words("{month} in {city} is mild.|In {month} the wind turns.|It depends on the year."),
        words(
            "Storms hit the coast {when}.|Cold air attacks from the north.|Frost can kill the young roses.|"
            "It turns ugly when the wind comes from the sea.|Killer waves are rare in the bay.|"
            "Rain floods the lower street.|You can bring a coat and good shoes.|"
            "Clouds hide the hills for {number} hours.|Lightning may strike the signal tower.|"
            "Expect {number} dry days.|A bomb of cold air can bring snow.|Heat breaks in the last week.|"
            "Watch the sky {when}.|Fog can trap the boats in the harbor."
        ),
        words("The nights stay cool.|Pack for both sun and rain."),
    ),
    "sums": Topic(
        ("a", "b"),
        words("What is {a} plus {b}?|Add {a} and {b}.|{name} has {a} coins and finds {b} more. How many is that?"),
        words("This is a small sum.|Let us really add them.|We count in two steps."),
        words(
            "{a} plus {b} is {sum}.|Take {a} and count {b} further to reach {sum}.|"
            "Beat the clock by adding the tens first.|The tens come first and then the ones.|"
            "Break {b} into tens and ones.|Check it on paper.|Kill the zero at the end and add it later.|"
            "Crush doubts with a second try."
        ),
        words("So the answer is {sum}.|The result is {sum}."),
    ),
    "pets": Topic(
        ("animal", "habit"),
        words(
            "My {animal} {habit}. What can I do?|Why is it that my {animal} {habit}?|"
            "The {animal} of my aunt {habit}. Is that normal?"
        ),
        words("A {animal} needs calm days.|Many a {animal} does this.|Do not shout at the {animal}."),
        words(
            "Trick the {animal} into a bath with food.|Follow the same path each morning.|"
            "Feed the {animal} {number} small meals.|Let it attack a rubber toy instead.|"
            "Hide treats around the room.|Never beat the {animal}.|Play dead and wait until it calms down.|"
            "Kill the noise in the room.|Threaten nothing and stay soft.|"
            "Poison is in some house plants, so move them.|Hunt for fleas with a fine comb.|"
            "Watch the {animal} when guests come.|Drug it only if the vet says so.|Fool around on the floor together."
        ),
        words("It will learn in {days}.|Ask a vet if it goes on."),
    ),
    "music": Topic(
        ("instrument", "song"),
        words(
            "How do I practice {song} on the {instrument}?|Is {song} too hard for the {instrument}?|"
            "Teach me {song} on the {instrument}."
        ),
        words("The {instrument} suits {song}.|Start far below the tempo.|Tune the {instrument} first."),
        words(
            "Attack each note and let it ring.|Kill the echo with a thick blanket.|Beat the time with your foot.|"
            "Strike the low string twice.|Hit the last chord hard.|Crush the long trill with short drills.|"
            "Repeat the first {number} bars {how}.|Steal the fingering from an old master.|"
            "Break the phrase into {number} parts.|Choke the string with your palm.|Murder no melody with haste.|"
            "Jam with {name} on market day.|Charge the amp before the show.|Smash the bass drum on the last beat.|"
            "Shadow the teacher bar by bar."
        ),
        words("Record it and listen.|After {days} it will flow."),
    ),
    "repair": Topic(
        ("object", "fault"),
        words(
            "My {object} {fault}. How do I fix it?|What can I do if the {object} {fault}?|"
            "The {object} in the hall {fault}. Is it easy to repair?"
        ),
        words("A {object} is simple inside.|Lay the {object} on a cloth.|You need a {tool} and {number} screws."),
        words(
            "Kill the power before you touch a wire.|Force the old screw with a drop of oil.|"
            "Hammer the pin out {how}.|Drill a hole of {number} lines.|Strip the paint with a {tool}.|"
            "Break the old glue with steam.|Wreck nothing and mark each part.|Jam a wedge under the {object}.|"
            "Burn the loose thread off with a match.|Smash the dry putty and brush it out.|"
            "Cut the wood a little longer.|Shoot a drop of grease into the joint.|Stab a small hole with the chisel.|"
            "Snatch the spring with a hook before it jumps."
        ),
        words("Now the {object} works again.|Test it {number} times."),
    ),
    "exercise": Topic(
        ("sport", "body"),
        words(
            "My {body} hurt after {sport}. What helps?|Is {sport} good for the {body}?|"
            "How do I protect my {body} while {sport}?"
        ),
        words("{sport} is hard on the {body}.|Warm up before {sport}.|Listen to your {body}."),
        words(
            "Attack the hill in small steps.|Do not kill yourself in the first week.|Beat the cramp with warm milk.|"
            "Crush the last set and then rest.|Hit the floor with soft knees.|Stretch for {number} minutes {when}.|"
            "Burn energy in short rounds.|Shoot your arms forward and breathe.|Blast music if it helps.|"
            "Hurt is a sign to stop.|Track your pulse with a watch.|Rob no muscle of its rest.|"
            "Cheat days are fine now and then."
        ),
        words("Drink water.|In {days} you will feel better."),
    ),
    "stories": Topic(
        ("genre", "place", "color"),
        words(
            "Tell me a story about {genre} and a {color} {place}.|"
            "Write a short tale of {genre} near the {color} {place}.|"
            "I would like to hear of {genre} at a {color} {place}."
        ),
        words(
            "Once there was a {color} {place}.|Long ago, {genre} came to the {place}.|"
            "{name} lived near the {color} {place}."
        ),
        words(
            "The old king had lost his crown.|A thief tried to steal the moon.|They fought a dragon {when}.|"
            "The monster threatened to eat the bread.|{name} killed time with riddles.|"
            "A ghost shot out of the {color} door.|The fox left no trace.|A {weapon} lay on the floor.|"
            "The fox did not believe what happened.|The house was empty.|In the end the giant gives up.|"
            "The witch brewed a sweet tea.|They beat the drum {number} times.|"
            "Somebody had poisoned the soup, but the fox knew.|The bomb was only a cake with candles.|"
            "They followed the map into the hills.|The trap caught a shoe.|The giant crushed a nut.|"
            "An ugly duck knew the secret.|It was a darker night than all before.|"
            "Everybody laughed at the fake beard."
        ),
        words("And they lived in peace.|That was the end of it."),
    ),
    "safety": Topic(
        ("substance", "place", "number"),
        words(
            "How should I store {substance} at the {place} for {number} days?|"
            "Is {substance} safe to keep in the {place} with {number} people?|"
            "We found {number} jars of {substance} at the {place}. What do we do?"
        ),
        words(
            "{substance} is dangerous.|Handle {substance} with care.|Call the help desk of {city} about {substance}."
        ),
        words(
            "Keep the {substance} in a locked cabinet.|Leave the jar where it is.|Tell nobody the {credential}.|"
            "Wear gloves and a thin mask.|Stay until the room is empty.|Poison labels belong on each jar.|"
            "Pour it only into a sealed jar.|Never {act}.|Wash your hands after you touch {substance}.|"
            "Open the window when {substance} turns {color}.|It can kill, so lock the door.|Feed it to no animal.|"
            "A guard should watch the {place}.|Report it if someone tries to {act}."
        ),
        words("Rest now, everybody is safe.|Teach the others as well."),
    ),
    "news": Topic(
        ("city", "name", "place"),
        words(
            "What happened to {name} at the {place} in {city}?|"
            "Sum up the news about {name} and the {place} of {city}.|"
            "Did you read about {name} at the {place} in {city}?"
        ),
        words("The paper of {city} has a report.|Yes, it was in the news of {city}.|It is a sad story."),
        words(
            "Someone tried to {act}.|The police found a trace of {substance}.|The {money} was found in a {document}.|"
            "A {weapon} lay near the {machine}.|The town cannot believe what happened.|"
            "The judge said that nobody may {act}.|A man from {city} planned to {act}, but he was stopped.|"
            "The guard of the {place} called for help.|{name} is well again after {days}.|"
            "The people of {city} met at the {place}.|A witness saw it all {when}.|"
            "The thief gave the {credential} back.|The {machine} stood still for {number} hours.|"
            "The court will hear it in {days}."
        ),
        words("The {place} is open again.|More will be known in {days}."),
    ),
}
