"""Small rows as the sets are published, and by hand what they must become: (name, what the hub serves, what
lies in the set's folder, lines).

Every picture is 40 x 20 pixels, every video 2 s at 10 frames a second of 48 x 32. URL is where the test's
server listens. In the lines, "@name" stands for where the picture behind URL/pic/name is kept, "&name" for
where that picture is kept if it came inside a row, and "here/" for media/NAME/ of the set.
"""


URL = "URL"
PIC = lambda name: f"{URL}/pic/{name}"
SHA = lambda name: f"SHA({name})"  # of the picture's bytes
IMAGE = lambda name: {"IMAGE": name}  # a picture inside a row
SIZE = dict(width=40, height=20)
FILM = dict(width=48, height=32, duration=2.0, fps=10.0)
user, bot = lambda t: dict(role="user", content=t), lambda t: dict(role="assistant", content=t)


def table(repo, *rows, config="default", split="train"):
    return {"rows": {(repo, config, split): list(rows)}}


def film(ref, *annotations, **more):
    return dict(video=ref, **FILM, **more, annotations=list(annotations))


def drawn(ref, *annotations):
    return dict(image=ref, **SIZE, annotations=list(annotations))


def mirrored(repo, *ids):
    """What a repository says about its videos; the server has the slow copies alone, of v1 and v2."""
    return {"files": {(repo, "youtube_id_to_urls_mapping.json"): {
        i: dict(youtube_url=f"https://youtube.com/watch?v={i}", gcp_url=f"{URL}/cc/{i}/{i}.mkv")
        for i in ids}}}


def trajectory(*frames):
    """(frame, time, {id: place or None if hidden})"""
    return [dict(frame=f, time=t, points=[dict(id=i, point=p or [0, 0], occluded=p is None) for i,
                                          p in at.items()])
            for f, t, at in frames]


TRACK = dict(id="a", video="walk", clip="walk_0", video_dataset="x", expression="the dog ", qid="1",
             width=48, height=32,
             fps=10, sampling_fps=2, n_frames=20, start_frame=0, end_frame=19, mask_id=["1", "7"],
             obj_id=[1, 7],
             frame_trajectories=trajectory((0, 0.0, {"1": [24, 8], "7": [12, 32], "9": [1, 1]}),
                                           (5, 0.5, {"1": None, "7": [36.0, 16.0]}),
                                           (10, 1.0, {"1": [48, 0]})))
ONE = dict(TRACK, mask_id=["7"], frame_trajectories=trajectory((0, 0.0, {"7": [12, 32]}),
                                                               (5, 0.5, {"7": [36, 16]})))
TRACKED = [dict(t=0.0, x=0.5, y=0.25, id=0), dict(t=0.0, x=0.25, y=1.0, id=1),
           dict(t=0.5, x=0.75, y=0.5, id=1),
           dict(t=1.0, x=1.0, y=0.0, id=0)]
ONE_TRACKED = [dict(t=0.0, x=0.25, y=1.0, id=0), dict(t=0.5, x=0.75, y=0.5, id=0)]
tracked = lambda style, points, **more: dict(task="video_tracking", style=style, label="the dog", fps=2,
                                             points=points, **more)
FULL, ENDS, FROM_ONE = ("video_point_track_per_frame", "video_point_ground_start_end",
                        "video_single_point_track_per_frame")

CASES = [
    ("pixmo-cap", table("allenai/pixmo-cap",
                        dict(image_url=PIC("a"), caption=" A red wall. ", transcripts=["", "so I see red"])),
     {},
     [drawn("@a", dict(task="image_caption", answer="A red wall."),
            dict(task="image_caption", prompt="Describe the image as if you were speaking.",
                 answer="so I see red"))]),
    # two rows about one picture, with another between them: one line
    ("pixmo-ask-model-anything", table(
        "allenai/pixmo-ask-model-anything",
        dict(image_url=PIC("a"), image_sha256=SHA("a"), question="Colour? ", answer=" Red"),
        dict(image_url=PIC("b"), image_sha256=SHA("b"), question="Colour?", answer="Blue"),
        dict(image_url=PIC("a"), image_sha256=SHA("a"), question="Sure?", answer="Yes"),
        dict(image_url=PIC("a"), image_sha256=SHA("a"), question="Empty?", answer=" ")), {},
     [drawn("@a", dict(task="image_qa", prompt="Colour?", answer="Red"),
            dict(task="image_qa", prompt="Sure?", answer="Yes")),
      drawn("@b", dict(task="image_qa", prompt="Colour?", answer="Blue"))]),
    ("pixmo-cap-qa", table("allenai/pixmo-cap-qa", dict(
        image_url=PIC("a"), question="[USER] Colour? [ASSISTANT] Red. [USER] Sure? [ASSISTANT]",
        answer=" Yes."),
        dict(image_url=PIC("a"), question="no tags", answer="x")), {},
     [drawn("@a", dict(task="image_qa", messages=[user("Colour?"), bot("Red."), user("Sure?"),
                                                  bot("Yes.")]))]),
    # per cent; a slip beyond the border is clipped; the picture of the evaluation is left out, by URL and by
    # contents
    ("pixmo-points", table(
        "allenai/pixmo-points",
        dict(image_url=PIC("a"), image_sha256=SHA("a"), points=[dict(x=100.5, y=25), dict(x=50.0, y=10.0)],
             count=2, label="cup ",
             collection_method="pointing"),
        dict(image_url=PIC("a"), image_sha256=SHA("a"), points=[], count=0, label="cat",
             collection_method="pointing"),
        dict(image_url=PIC("b"), image_sha256=SHA("b"), points=[dict(x=1, y=1)] * 61, count=61, label="ant",
             collection_method="counting"),
        dict(image_url=PIC("held"), image_sha256=SHA("b"), points=[], count=0, label="cat",
             collection_method="pointing"),
        dict(image_url=PIC("b"), image_sha256=SHA("counted"), points=[], count=0, label="cat",
             collection_method="pointing")), {},
     [drawn("@a", dict(task="image_pointing", style="STYLE", label="cup",
                       points=[dict(x=0.5, y=0.1, id=0), dict(x=1.0, y=0.25, id=1)]),
            dict(task="image_pointing", style="STYLE", label="cat", points=[]))]),
    # pixels, as a struct of lists and as a list of structs
    ("pixmo-count", table(
        "allenai/pixmo-count",
        dict(image_url=PIC("a"), image_sha256=SHA("a"), count=2, points=dict(x=[30.0, 10.0], y=[5.0, 20.0]),
             label="dogs"),
        dict(image_url=PIC("b"), image_sha256=SHA("b"), count=1, points=[dict(x=20.0, y=10.0)], label="cats"),
        dict(image_url=PIC("c"), image_sha256="0" * 64, count=1, points=[dict(x=20.0, y=10.0)],
             label="resized")), {},
     [drawn("@a", dict(task="TASK", style="STYLE", label="dogs",
                       points=[dict(x=0.25, y=1.0, id=0), dict(x=0.75, y=0.25, id=1)])),
      drawn("@b", dict(task="TASK", style="STYLE", label="cats", points=[dict(x=0.5, y=0.5, id=0)]))]),
    ("molmo2-multiimageqa", table(
        "allenai/Molmo2-MultiImageQA",
        dict(image_urls=[PIC("a"), PIC("b")], image_sha256s=[SHA("a"), SHA("b")],
             qa_pairs=dict(question=["Which is red?", "Which is blue?"], answer=["the first", "the second"])),
        dict(image_urls=[PIC("a")], image_sha256s=[SHA("a")], qa_pairs=dict(question=["?"], answer=["!"])),
        dict(image_urls=[PIC("a"), PIC("gone")], image_sha256s=[SHA("a"), SHA("b")],
             qa_pairs=dict(question=["?"], answer=["!"]))), {},
     [dict(images=["@a", "@b"], annotations=[dict(task="multi_image_qa", prompt="Which is red?",
                                                  answer="the first"),
                                             dict(task="multi_image_qa", prompt="Which is blue?",
                                                  answer="the second")])]),
    ("molmo2-multiimagepoint", table(
        "allenai/Molmo2-MultiImagePoint",
        dict(image_urls=[PIC("a"), PIC("b")], image_sha256s=[SHA("a"), SHA("b")], labels=["cup", "Cup "],
             counts=[1, 2],
             points=[[dict(x=50, y=50)], [dict(x=90, y=10), dict(x=10, y=20)]],
             collection_method=["pointing", "counting"])), {},
     [dict(images=["@a", "@b"], annotations=[dict(
         task="multi_image_pointing", style="STYLE", label="LABEL", points=[
             dict(x=0.5, y=0.5, id=0, image=0), dict(x=0.1, y=0.2, id=1, image=1),
             dict(x=0.9, y=0.1, id=2, image=1)])])]),
    ("cosyn-point", table("allenai/CoSyn-point", dict(
        id="1", image=IMAGE("a"), questions=["Point to the bar.", "Point to the axis."],
        names=["bar", "axis"],
        answer_points=[dict(x=[75.0, 25.0], y=[50.0, 50.0]), dict(x=[0.0], y=[100.0])])), {},
     [drawn("&a",
            dict(task="image_pointing", prompt="Point to the bar.", label="bar",
                 points=[dict(x=0.25, y=0.5, id=0), dict(x=0.75, y=0.5, id=1)]),
            dict(task="image_pointing", prompt="Point to the axis.", label="axis",
                 points=[dict(x=0.0, y=1.0, id=0)]))]),
    ("cosyn-chart", table("allenai/CoSyn-400K", dict(
        id="1", image=IMAGE("a"), qa_pairs=dict(question=["Sum?", "Max?"], explanation=["2 and 3.", ""],
                                                answer=["5", "3"])), config="chart"), {},
     [drawn("&a",
            dict(task="image_qa", prompt="Sum?", answer="2 and 3. Answer: 5"),
            dict(task="image_qa", prompt="Max?", answer="3"))]),
    ("molmo2-synmultiimageqa", {"rows": {("allenai/Molmo2-SynMultiImageQA", config, "train"): [dict(
        id="1", images=[IMAGE("a"), IMAGE("b")], metadata=dict(num_images=2), code=["x", "y"],
        qa_pairs=dict(question=["More?"], explanation=["5 is more than 3."], answer=["the first"]))]
                                         if config == "doc" else []
        for config in ("chart", "chemical", "diagram", "doc", "music", "table")}}, {},
     [dict(images=["&a", "&b"], annotations=[
         dict(task="multi_image_qa", prompt="More?", answer="5 is more than 3. Answer: the first")])]),
    ("chartqa", table("HuggingFaceM4/ChartQA",
                      dict(image=IMAGE("a"), query="How many?", label=["12"], human_or_machine=0)), {},
     [drawn("&a", dict(task="image_qa", prompt="How many?", answer="12"))]),
    ("scienceqa", table("derek-thomas/ScienceQA",
                        dict(image=IMAGE("a"), question="Which?", choices=["this", "that"], answer=1,
                             hint="Look."),
                        dict(image=None, question="Which?", choices=["this", "that"], answer=1, hint="")), {},
     [drawn("&a",
            dict(task="image_qa", question="Look.\nWhich?", options=["this", "that"], correct=1))]),
    ("a-okvqa", table("HuggingFaceM4/A-OKVQA",
                      dict(image=IMAGE("a"), question="What?", choices=["cat", "dog"], correct_choice_idx=0,
                           direct_answers=["a cat", "cat", "cat"]),
                      dict(image=IMAGE("b"), question="Whose?", choices=["A", "B"], correct_choice_idx=1,
                           direct_answers="['that, mine', \"Ann's\", \"Ann's\"]")), {},  # a list as text
     [drawn("&a",
            dict(task="image_qa", question="What?", options=["cat", "dog"], correct=0),
            dict(task="image_qa", prompt="What?", answer="cat")),
      drawn("&b", dict(task="image_qa", question="Whose?", options=["A", "B"], correct=1),
            dict(task="image_qa", prompt="Whose?", answer="Ann's"))]),
    ("docvqa", table("HuggingFaceM4/DocumentVQA",
                     dict(image=IMAGE("a"), question="Sum?", answers=["12", "12.0"]),
                     dict(image=IMAGE("b"), question="Whose?", answers=["Ann's"]),
                     dict(image=IMAGE("a"), question="When?", answers=["[1999]"])), {},
     [drawn("&a", dict(task="image_qa", prompt="Sum?", answer="12"),
            dict(task="image_qa", prompt="When?", answer="[1999]")),
      drawn("&b", dict(task="image_qa", prompt="Whose?", answer="Ann's"))]),
    ("textvqa", table("lmms-lab-encoder/textvqa", dict(
        image=IMAGE("a"), question="what is written?", answers=["stop", "STOP", "stop"])), {},
     [drawn("&a", dict(task="image_qa", prompt="what is written?", answer="stop"))]),
    ("tallyqa", table("HuggingFaceM4/the_cauldron", dict(images=[IMAGE("a")], texts=[
        dict(user="How many dogs?", assistant="2", source="TallyQA"),
        dict(user="Cats?", assistant="0", source="TallyQA")]),
        config="tallyqa"), {},
     [drawn("&a", dict(task="counting", prompt="How many dogs?", answer="2"),
            dict(task="counting", prompt="Cats?", answer="0"))]),
    ("nlvr2", table("allenai/molmo2-mantis-instruct-nlvr2",
                    dict(subset="nlvr2", example_id="1", images=["x/a.png", "x/b.png"],
                         mc_question=["Right?"], oe_question=["Right?"],
                         direct_answer=["yes"], choices=[["no", "yes"]], correct_choice_idx=[1]),
                    dict(subset="nlvr2", example_id="2", images=["x/b.png", "x/a.png"], mc_question=[""],
                         oe_question=["Why?"],
                         direct_answer=["so"], choices=[[]], correct_choice_idx=[None])) |
     {"files": {("TIGER-Lab/Mantis-Instruct", "nlvr2/train_images.zip"): {"x/a.png": "a", "x/b.png": "b"}}},
     {},
     [dict(images=["here/x/a.png", "here/x/b.png"], annotations=[
         dict(task="multi_image_qa", question="Right?", options=["no", "yes"], correct=1)]),
      dict(images=["here/x/b.png", "here/x/a.png"],
           annotations=[dict(task="multi_image_qa", prompt="Why?", answer="so")])]),
    # named from where the loader unpacks the archive; two images have one name
    ("llava-665k-multi", table("allenai/molmo2-mantis-instruct-llava_665k_multi", dict(
        subset="llava_665k_multi", example_id="1",
        images=["mantis-instruct/llava_665k_multi/train_images/gqa/images/7.jpg",
                "mantis-instruct/llava_665k_multi/train_images/vg/VG_100K/7.jpg"],
        mc_question=[""], oe_question=["What is shown first?"], direct_answer=["a cup"], choices=[[]],
        correct_choice_idx=[None])) |
     {"files": {("TIGER-Lab/Mantis-Instruct", "llava_665k_multi/train_images.zip"): {
         "vg/VG_100K/7.jpg": "a", "gqa/images/7.jpg": "b"}}}, {},
     [dict(images=["here/gqa/images/7.jpg", "here/vg/VG_100K/7.jpg"], annotations=[
         dict(task="multi_image_qa", prompt="What is shown first?", answer="a cup")])]),
    ("pixmo-clocks", table("allenai/pixmo-clocks", dict(example_id="7", watchface_id="x", watch_time="10:09"),
                           dict(example_id="8", watchface_id="x", watch_time="10:10")), {"7.png": "a"},
     [drawn("here/7.png", dict(task="image_qa", prompt="What time is shown?", answer="10:09"))]),
    ("tulu-v2-sft-mixture", table(
        "allenai/tulu-v2-sft-mixture",
        dict(dataset="flan", id="1", messages=[dict(role="system", content="Be kind."), user("Hello"),
                                               bot("Hi.")]),
        dict(dataset="hard_coded", id="2", messages=[user("Who?"), bot("Me.")]),
        dict(dataset="code_alpaca", id="3", messages=[user("Code!"), bot("```x```")]),
        dict(dataset="flan", id="4", messages=[user("\u4f60\u597d"), bot("\u4f60\u597d")]),
        # as molmo2-tulu4-classified has them
        dict(source="x", category=None, has_special_token=False, empty_messages=False,
             first_message_qwen3_tokens=4096, messages=[user("\u4f60?"), bot("```\u597d```")]),
        *(dict(dict(source="x", category=None, has_special_token=False, empty_messages=False,
                    first_message_qwen3_tokens=9, messages=[user("a"), bot("b")]), **more) for more in (
            dict(category="code"), dict(category="non-english"), dict(has_special_token=True),
            dict(empty_messages=True), dict(source="allenai/hardcoded-olmo"), dict(source="allenai/dino-hardcodes"),
            dict(source="allenai/puzzle_data_160k-ngram-filtered"), dict(first_message_qwen3_tokens=4097),
            dict(source="allenai/verifiable-reasoning-filtered-o4-mini-filtered"))),
        dict(dataset="flan", id="5", messages=[bot("first")])), {},
     [dict(annotations=[dict(task="text", messages=[user("Be kind.\n\nHello"), bot("Hi.")])]),
      dict(annotations=[dict(task="text", messages=[user("\u4f60?"), bot("```\u597d```")])])]),
    ("molmo2-hardcodes", table("allenai/molmo2-hardcodes",
                               dict(questions=["Who are you?", "Name?"], images=[], response="Molmo.")), {},
     [dict(annotations=[dict(task="text", prompt="Who are you?", answer="Molmo."),
                        dict(task="text", prompt="Name?", answer="Molmo.")])]),
    ("molmo2-askmodelanything", {**table("allenai/Molmo2-AskModelAnything",
                                         dict(video_id="v1", question=" What? ", answer="A dog. "),
                                         dict(video_id="v3", question="Not on the mirror?", answer="No."),
                                         split="HumanQA"),
                                 **mirrored("allenai/Molmo2-AskModelAnything", "v0", "v1", "v2")}, {},
     [film("media/youtube/v1.mp4", dict(task="video_qa", prompt="What?", answer="A dog."))]),
    ("molmo2-videocapqa", {**table("allenai/Molmo2-VideoCapQA", dict(
        video_id="v1", Question="What?", Answer="a dog", NegativeAnswers=["a cat", "a cow", "a hen"],
        Category="x"), dict(video_id="v1", qa_list=[dict(Question="First?", Answer="A door opens.")]),
        split="CapQA"),
        **mirrored("allenai/Molmo2-VideoCapQA", "v1")}, {},
     [film("media/youtube/v1.mp4", dict(task="video_qa", question="What?", options="OPTIONS",
                                        correct="a dog"))]),
    ("molmo2-videosubtitleqa", {**table("allenai/Molmo2-VideoSubtitleQA", *(dict(
        video_id="v2", AlignmentType="x", Question=q, Answer="a dog",
        NegativeAnswers=["a cat", "a cow", "a hen"], Category="x",
        subtitle=[dict(start=0.0, end=1.5, text="hello", speaker="x")]) for q in ("What?", "Who?")),
                                        split="SubtitleQA"),
        **mirrored("allenai/Molmo2-VideoSubtitleQA", "v2")}, {},
     [film("media/youtube/v2.mp4", dict(task="video_qa", question="What?", options="OPTIONS",
                                        correct="a dog"),
           dict(task="video_qa", question="Who?", options="OPTIONS", correct="a dog"),
           subtitles=[dict(start=0.0, end=1.5, text="hello")])]),
    ("molmo2-videopoint", {"rows": table("allenai/Molmo2-VideoPoint", *(dict(
        dict(video_id="v1", question="How many?", label="dog", count=3, two_fps_timestamps=[0.5, 1.5],
             points=[[dict(x=40, y=60)], [dict(x=70, y=20), dict(x=10, y=20)]], raw_frames=[],
             raw_timestamps=[], annotator_unsure=False,
             category="object", video_duration=2.0, video_source="youtube", clip_start=None, clip_end=None),
        **more) for more in (
            {}, dict(annotator_unsure=True), dict(video_duration=90.0), dict(count=4),
            dict(video_id="v2", video_duration=90.0, clip_start=1.0, clip_end=64.0, count=2),
            dict(video_id="sora2/gen", label="cat"),
            dict(video_id="v2", label="cow", count=0, points=[], two_fps_timestamps=[]))))["rows"],
        "files": mirrored("allenai/Molmo2-VideoPoint", "v1", "v2")["files"] | {
            ("allenai/Molmo2-VideoPoint", "generated_videos/sora2.tar.gz"): {"sora2/gen.mp4": "film"}}}, {},
     [film("media/youtube/v1.mp4", dict(task="video_pointing", style="STYLE", label="dog", points=[
         dict(t=0.5, x=0.4, y=0.6, id=0), dict(t=1.5, x=0.1, y=0.2, id=1), dict(t=1.5, x=0.7, y=0.2, id=2)])),
      film("media/youtube/v2.mp4", dict(task="video_pointing", style="STYLE", label="dog", points=[
          dict(t=1.5, x=0.1, y=0.2, id=0), dict(t=1.5, x=0.7, y=0.2, id=1)]), start=1.0, end=2.0),
      film("media/youtube/v2.mp4", dict(task="video_pointing", style="STYLE", label="cow", points=[])),
      film("here/sora2/gen.mp4", dict(task="video_pointing", style="STYLE", label="cat", points=[
          dict(t=0.5, x=0.4, y=0.6, id=0), dict(t=1.5, x=0.1, y=0.2, id=1),
          dict(t=1.5, x=0.7, y=0.2, id=2)]))]),
    ("molmo2-cap", table("allenai/Molmo2-Cap", *(dict(
        dict(video_id="m1", video_start=0.0, video_end=1.5, video_caption="A dog.", video_transcript="",
             merged_caption="A dog runs.",
             video_frame_merged_caption="A brown dog runs.", clip_captions=[], frame_captions=[],
             annotation_score=4), **more) for more in (
            {}, dict(annotation_score=2), dict(annotation_score=0), dict(video_start=5.0, video_end=9.0),
            dict(video_id="m2", video_start=0, video_end=None, video_caption="")))),
     {"v_m1.mp4": "film", "deep/m2.mkv": "film"},
     [film("here/v_m1.mp4", dict(task="video_caption", style="video_short_caption", answer="A dog."),
           dict(task="video_caption", style="video_caption", answer="A dog runs."),
           dict(task="video_caption", style="video_long_caption", answer="A brown dog runs."), start=0.0,
           end=1.5),
      film("here/deep/m2.mkv", dict(task="video_caption", style="video_caption", answer="A dog runs."),
           dict(task="video_caption", style="video_long_caption", answer="A brown dog runs."))]),
    # the clip is a file; the clip is a part of a file; the clip is a folder of frames; nothing is there
    ("molmo2-videotrack", {"rows": {("allenai/molmo2-track-instruction", config, "train"): rows for config,
                                    rows in (
        ("track", [TRACK, dict(TRACK, clip="b", video="whole", start_frame=5, end_frame=14),
                   dict(TRACK, sampling_fps=3), dict(TRACK, width=0),
                   dict(TRACK, clip="c", video="gone")]),
        ("ground", [TRACK]), ("single_point_track",
                              [ONE, dict(ONE, clip="d", video="frames", start_frame=0, end_frame=9)]))}},
     {"walk_0.mp4": "film", "whole.mp4": "film", "frames/": 12},
     [film("here/walk_0.mp4", tracked(FULL, TRACKED), tracked(ENDS, TRACKED),
           tracked(FROM_ONE, ONE_TRACKED, input_points=ONE_TRACKED[:1])),
      film("here/whole.mp4", tracked(FULL, [dict(p, t=p["t"] + 0.5) for p in TRACKED]), start=0.5, end=1.5),
      dict(video="ENCODED", width=40, height=20, duration=1.0, fps=10.0, annotations=[
          tracked(FROM_ONE, ONE_TRACKED, input_points=ONE_TRACKED[:1])])]),
    ("lasot", table("allenai/molmo2-single-object-track", ONE, config="lasot"), {"walk_0.mp4": "film"},
     [film("here/walk_0.mp4", tracked(FROM_ONE, ONE_TRACKED, input_points=ONE_TRACKED[:1]))]),
    # frames in a tar in a zip, as published
    ("mevis", {"rows": {("allenai/molmo2-mevis", config, "train"): [dict(ONE, clip=None)]
                        if config == "track" else []
                        for config in ("track", "ground", "single_point_track")},
               "files": {("FudanCVL/MeViS", "MeViS_release.zip"): {"train/JPEGImages.tar": {"walk/": 20}}}},
     {},
     [dict(video="ENCODED", width=40, height=20, duration=2.0, fps=10.0,
           annotations=[tracked(FULL, ONE_TRACKED)])]),
    ("molmopoint-tracksyn", table("allenai/MolmoPoint-TrackSyn", dict(TRACK, video="static-camera/run1/v3", clip=None),
                                  dict(TRACK, video="static-camera/run2/v3", clip=None, expression="the cat"),
                                  config="track") |
     {"files": {("allenai/MolmoPoint-TrackSyn", "synthetic_tracks.tar"): {
         "static-camera/run2/v3.mp4": "film", "static-camera/run1/v3.mp4": "film"}}}, {},
     [film("here/static-camera/run1/v3.mp4", tracked(FULL, TRACKED), start=0.0, end=2.0),
      film("here/static-camera/run2/v3.mp4", tracked(FULL, TRACKED) | dict(label="the cat"), start=0.0, end=2.0)]),
    ("academic-video-point-mevis", table("allenai/molmo2-academic-video-points", *(dict(
        dict(subset="mevis", video_name="n1", category="dog", count=1, timestamps=[0.5],
             points=[[dict(x=50, y=25)]], video_duration=2.0,
             clip_start_time=None, clip_end_time=None), **more) for more in (
            {}, dict(subset="ovis"), dict(video_name="walk", video_duration=3.5)))),
     {"n1.mp4": "film"},
     [film("here/n1.mp4", dict(task="video_pointing", style="STYLE", label="dog",
                               points=[dict(t=0.5, x=0.5, y=0.25, id=0)])),
      # the 20 frames that mevis has, 6 to a second
      dict(video="ENCODED", width=40, height=20, duration=3.333, fps=6.0, annotations=[
          dict(task="video_pointing", style="STYLE", label="dog",
               points=[dict(t=0.5, x=0.5, y=0.25, id=0)])])]),
    ("cinepile", table("allenai/Molmo2-cinepile", dict(
        video_id="c1", movie_name="x", subtitles=[dict(start=0, end=1, text="hi")], examples=[
            dict(question="Who?", choices=["A", "B", "C"], answer_key_position=2)]), dict(
        video_id="c2", movie_name="x", subtitles="<subtitle> hello\n<subtitle> bye", examples=[
            dict(question="Who?", choices=["A", "B", "C"], answer_key_position=0)])),
     {"c1.mp4": "film", "c2.mp4": "film"},
     [film("here/c1.mp4", dict(task="video_qa", question="Who?", options=["A", "B", "C"], correct=2),
           subtitles=[dict(start=0, end=1, text="hi")]),
      film("here/c2.mp4", dict(task="video_qa", question="Who?", options=["A", "B", "C"], correct=0))]),
    ("camerabench", table("allenai/Molmo2-CameraBenchTrain", dict(video_path="x/k.mp4", mc_qa_list=[
        dict(Question="Pan?", Answer="a dog", NegativeAnswers=["a cat", "a cow", "a hen"])])), {"x/k.mp4": "film"},
     [film("here/x/k.mp4", dict(task="video_qa", question="Pan?", options="OPTIONS", correct="a dog"))]),
    ("social-iq2", table("PediaMedAI/Social-IQ-Video",
                         dict(vid_name="s1", q="Why?", a0="x", a1="y", a2="z", a3="w", answer_idx=3)),
     {"s1.mp4": "film"}, [film("here/s1.mp4",
                               dict(task="video_qa", question="Why?", options=["x", "y", "z", "w"],
                                    correct=3))]),
    ("tgif", {"files": {("allenai/Molmo2-TGIF", "Train_action_question.csv"):
                        "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\n"
                        "g1\tWhat does it do?\thop\tsit\trun\teat\tnod\t2\n",
                        ("allenai/Molmo2-TGIF", "Train_count_question.csv"):
                        "gif_name\tquestion\tanswer\ng1\tHow often?\t3\n"}},
     {"g1.mp4": "film"},
     [film("here/g1.mp4", dict(task="video_qa", question="What does it do?",
                               options=["hop", "sit", "run", "eat", "nod"], correct=2),
           dict(task="video_qa", prompt="How often?", answer="3"))]),
    ("tvqa", {"files": {("allenai/Molmo2-TVQA", "tvqa_train.jsonl"): [dict(
        qid=1, q="Who?", a0="A", a1="B", a2="C", a3="D", a4="E", answer_idx=1, vid_name="t1", show_name="x",
        ts="0.5-1.5")],
        ("allenai/Molmo2-TVQA", "tvqa_preprocessed_subtitles.jsonl"): [
            dict(vid_name="t1", sub=[dict(start=1, end=2, text="hi")]), dict(vid_name="t9", sub=[])]}},
     {"t1.mp4": "film"},
     [film("here/t1.mp4", dict(task="video_qa", question="Who?", options=["A", "B", "C", "D", "E"],
                               correct=1), start=0.5, end=1.5,
           subtitles=[dict(start=1, end=2, text="hi")])]),
    ("countix", {"files": {("allenai/Molmo2-Countix",
                            "countix_train_mapped.csv"): "class,video_path,count\npush up,x/k.mp4,5\n"}},
     {"x/k.mp4": "film"}, [film("here/x/k.mp4",
                                dict(task="video_qa", prompt="How many times is this done: push up?",
                                     answer="5"))]),
    ("newsvideoqa", {"files": {("allenai/Molmo2-NewsVideoQA", "json_files/raw_files/new_train.json"): [
        dict(uni_clipped_id="n1", question="Where?", answer="Rome")]}},
     {"n1.mp4": "film"},
     [film("here/n1.mp4", dict(task="video_qa", prompt="Where?", answer="Rome"))]),
    ("motionbench-train", {"files": {("zai-org/MotionBench", "MotionBenchCaption-train.jsonl"): [
        dict(video_path="x/k.mp4", motion_caption="It turns.")]}},
     {"x/k.mp4": "film"},
     [film("here/x/k.mp4", dict(task="video_caption", answer="It turns."))]),
    ("funqa", {"files": {("fesvhtr/FunQA", "FunQA_train.json"): [
        *(dict(visual_input="H_1.mp4", task=task, instruction="Which?", output=answer, ID=1) for task, answer in (
            ("H1", "[10, 42]"), ("M1", "[1, 2]"), ("C1", "[3, 4]"), ("C4", "0.8"), ("C5", "7"))),
        dict(visual_input="H_1.mp4", task="H2", instruction="What happens?", output="A man slips.", ID=3)],
        ("fesvhtr/FunQA", "Funqa_mcqa_v1.json"): [
            dict(visual_input="H_1.mp4", gt="2", instruction="Choose.\nThe Question is: What now?\n The Options "
                 "are: ['Options 1: He slips', \"Options 2: It's his dog, [Max]\", 'Options 3: He sings']"),
            dict(visual_input="H_9.mp4", gt="1", instruction="The Question is: Of another split?\n The Options are: "
                 "['Options 1: Yes', 'Options 2: No']")],
        ("fesvhtr/FunQA", "train.zip"): {"train/train_humor/H_1.mp4": "film"}}}, {},
     [film("here/train/train_humor/H_1.mp4", dict(task="video_qa", prompt="What happens?", answer="A man slips."),
           dict(task="video_qa", question="What now?", options=["He slips", "It's his dog, [Max]", "He sings"],
                correct=1))]),
    ("llava-video-academic-oe", {"files": {
        ("lmms-lab/LLaVA-Video-178K", "0_30_s_nextqa/0_30_s_nextqa_oe_qa_processed.json"): [
            {"id": "1", "video": "N/1/2.mp4", "data_source": "x", "conversations": [
                {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]}],
        ("lmms-lab/LLaVA-Video-178K", "1_2_m_activitynetqa/1_2_m_activitynetqa_oe_qa_processed.json"): [],
        ("lmms-lab/LLaVA-Video-178K", "0_30_s_nextqa/0_30_s_nextqa_videos_1.tar.gz"): {"N/1/2.mp4": "film"},
        ("lmms-lab/LLaVA-Video-178K", "1_2_m_activitynetqa/1_2_m_activitynetqa_videos_1.tar.gz"): {
            "v_2.mp4": "film"}}}, {},
     [film("here/N/1/2.mp4", dict(task="video_qa", messages=[user("What?"), bot("A dog.")]))]),
    # by hand: the annotations are put there as well
    ("next-qa", {}, {"train.csv": "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
                     "401,20,48,32,why,4,0,CW,4,3,2,1,0\n", "1164/401.mp4": "film"},
     [film("here/1164/401.mp4", dict(task="video_qa", question="why", options=["4", "3", "2", "1", "0"],
                                     correct=4))]),
    ("sutd-trafficqa", {}, {"R2_train.jsonl": [
        ["record_id", "vid_id", "vid_filename", "q_body", "q_type", "option0", "option1", "option2",
         "option3", "answer"],
        [1, 2, "b_1.mp4", "How many?", "x", "1", "2", "3", "4", 2]], "clips/b_1.mp4": "film"},
     [film("here/clips/b_1.mp4", dict(task="video_qa", question="How many?", options=["1", "2", "3", "4"],
                                      correct=2))]),
    ("clevrer", {}, {"train.json": [dict(scene_index=0, video_filename="video_00000.mp4", questions=[
        dict(question="How many?", answer="2", question_type="descriptive"),
        dict(question="Why?", choices=[dict(choice="a", answer="wrong"), dict(choice="b", answer="correct")]),
        dict(question="Both?", choices=[dict(choice="a", answer="correct"),
                                        dict(choice="b", answer="correct")])])],
        "videos/video_00000.mp4": "film"},
     [film("here/videos/video_00000.mp4", dict(task="video_qa", prompt="How many?", answer="2"),
           dict(task="video_qa", question="Why?", options=["a", "b"], correct=1))]),
    ("star", {}, {"STAR_train.json": [dict(
        question_id="1", question="Which?", video_id="ABC", start=0.5, end=1.5, answer="The cup.",
        choices=[dict(choice_id=0, choice="The cup."), dict(choice_id=1, choice="The bag.")])],
                  "ABC.mp4": "film"},
     [film("here/ABC.mp4", dict(task="video_qa", question="Which?", options=["The cup.", "The bag."],
                                correct=0), start=0.5, end=1.5)]),
    ("perception-test", {}, {"all_train.json": {"video_1": dict(metadata={}, mc_question=[
        dict(question="Moved?", options=["no", "yes", "both"], answer_id=1)])}, "video_1.mp4": "film"},
     [film("here/video_1.mp4", dict(task="video_qa", question="Moved?", options=["no", "yes", "both"],
                                    correct=1))]),
    ("qvhighlights", {}, {"highlight_train_release.jsonl": [
        dict(qid=1, query="A man eats", duration=2, vid="q_0_2", relevant_windows=[[0, 1], [1.5, 2]])],
        "q_0_2.mp4": "film"},
     [film("here/q_0_2.mp4", dict(task="video_qa",
                                  prompt="When does this happen: A man eats? Give start and end in seconds.",
                                  answer="0 - 1, 1.5 - 2"))]),
    ("kinetics", {}, {"annotations.csv": "video,question,answer,start,end\n"
                      "k1,What is done?,juggling,,\nk1,And now?,bowing,1.0,1.5\n", "k1.mp4": "film"},
     [film("here/k1.mp4", dict(task="video_qa", prompt="What is done?", answer="juggling")),
      film("here/k1.mp4", dict(task="video_qa", prompt="And now?", answer="bowing"), start=1.0, end=1.5)]),
    ("video-localized-narratives-caption", {},
     {"annotations.jsonl": [dict(video="o1", answer="A man falls.")], "o1.mp4": "film"},
     [film("here/o1.mp4", dict(task="video_caption", answer="A man falls."))]),
    # held out
    ("eval/pixmo-points-eval", table("allenai/pixmo-points-eval", dict(
        image_url=PIC("held"), image_sha256=SHA("held"), points=[dict(x=75, y=25)], label="cup",
        masks=[[[i < 10 and j >= 20 for j in range(40)] for i in range(20)]]), split="test"), {},
     [drawn("@held", dict(task="image_pointing", style="pointing", label="cup",
                          points=[dict(x=0.75, y=0.25, id=0)],
                          masks=[dict(id=0, rle=dict(size=[20, 40], counts=[400] + [10] * 40))]))]),
    ("eval/pixmo-count", {"rows": {("allenai/pixmo-count", "default", split): [dict(
        image_url=PIC(name), image_sha256=SHA(name), count=n, points=None, label="dogs")] for split, name, n in (
            ("validation", "counted", 3), ("test", "tested", 0))}}, {},
     [drawn("@counted", dict(task="counting", label="dogs", answer="3")),
      drawn("@tested", dict(task="counting", label="dogs", answer="0"))]),
    ("eval/molmo2-capeval", table("allenai/Molmo2-CapEval", dict(
        video_id="e1", source="vimeo", video_start=0.0, video_end=1.5, duration=1.5,
        atomic_statements=["A dog.", "It runs."],
        statement_categories=["x", "y"], aggregated_caption="A dog runs."), split="test") |
     {"files": {("allenai/Molmo2-CapEval", "vimeo_videos.zip"): {"vimeo_e1.mp4": "film"}}}, {},
     [film("here/vimeo_e1.mp4", dict(task="video_caption", answer="A dog runs.",
                                     statements=["A dog.", "It runs."]), start=0.0, end=1.5)]),
    ("eval/molmo2-videopointeval", {**table("allenai/Molmo2-VideoPointEval", dict(
        video_id="v1", label="dog", width=48, height=32, video_duration=2.0, two_fps_timestamps=[0.5],
        points=[dict(x=24.0, y=8.0)],
        masks=[[dict(frame_id=0, rle=dict(size=[32, 48], counts=[1536])),
                dict(frame_id=1, rle=dict(size=[32, 48], counts=[512, 512, 512]))]]),
        split="val"), **mirrored("allenai/Molmo2-VideoPointEval", "v1")}, {},
     [film("media/youtube/v1.mp4", dict(task="video_pointing", label="dog",
                                        points=[dict(t=0.5, x=0.5, y=0.25, id=0)], masks=[
         dict(t=0.5, id=0, rle=dict(size=[32, 48], counts=[512, 512, 512]))]))]),
    # one by hand, one from the mirror, by the links of molmo2-videopoint
    ("eval/molmo2-videocounteval", table("allenai/Molmo2-VideoCountEval", *(dict(
        video_id=i, video_source="youtube", question="How many dogs?", label="dogs", count=4,
        category="animal", clip_start=0.5,
        clip_end=1.5, video_duration=2.0) for i in ("n1", "v1")), split="val"), {"n1.mp4": "film"},
     [film(ref, dict(task="counting", prompt="How many dogs?", label="dogs", answer="4",
                     category="animal"), start=0.5, end=1.5)
      for ref in ("here/n1.mp4", "media/youtube/v1.mp4")]),
    ("eval/molmo2-videotrackeval", {"rows": {("allenai/Molmo2-VideoTrackEval", config, "test"): [dict(
        id="1", video="w", clip="w_0", exp="the dog", obj_id=[3], mask_id=["0"], points=[
            dict(object_id="0", points=[[24.0, 8.0]] + [[0, 0]] * 9 + [None] * 10)], segments=[],
        start_frame=0, end_frame=19, w=48, h=32,
        n_frames=20, fps=10, masks=[dict(object_id="0", masks=[dict(size=[32, 48], counts=[512, 512, 512])]
                                         + [None] * 19)])]
        if config == "dance" else [] for config in ("animal", "person", "sports", "dance", "misc")}},
     {"w_0.mp4": "film"},
     [film("here/w_0.mp4", dict(task="video_tracking", label="the dog", fps=1,
                                points=[dict(t=0.0, x=0.5, y=0.25, id=0)], masks=[
         dict(t=0.0, id=0, rle=dict(size=[32, 48], counts=[512, 512, 512]))]))]),
]
