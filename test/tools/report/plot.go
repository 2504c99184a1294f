package main

import (
	"image/color"
	"math"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// A picture is one column of a phase against the number of volumes.
type picture struct {
	file, phase, column, title, unit string
	scale                            float64 // of a value
	log                              bool
}

var plots = []picture{
	{"reboot.svg", "reboot", "seconds", "Reboot: time until all volumes are mounted", "seconds, emulated", 1, true},
	{"first-boot.svg", "first boot", "seconds", "First boot: time until all volumes are made and mounted", "seconds, emulated", 1, true},
	{"memory.svg", "reboot", "sum_kib", "Reboot: peak memory of all processes together", "MiB", 1024, true},
}

// colours that also differ in lightness (Okabe and Ito, "Color Universal Design", 2008).
var colours = []color.RGBA{
	{0, 0, 0, 255}, {213, 94, 0, 255}, {230, 159, 0, 255}, {240, 228, 66, 255}, {0, 114, 178, 255}, {86, 180, 233, 255}, {0, 158, 115, 255}, {204, 121, 167, 255}, {120, 120, 120, 255},
}

// spreads are points with the least and the most of each.
type spreads struct {
	plotter.XYs
	plotter.YErrors
}

// steps are the ticks of a logarithmic axis: 1, 2, 5, 10 …
func steps(low, high float64) []plot.Tick {
	var ticks []plot.Tick
	for decade := math.Pow(10, math.Floor(math.Log10(low))); decade <= high; decade *= 10 {
		for _, step := range []float64{1, 2, 5} {
			if v := decade * step; v >= low && v <= high {
				ticks = append(ticks, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'g', 3, 64)})
			}
		}
	}
	return ticks
}

func (r *results) plot(pic picture, file string) error {
	p := plot.New()
	p.Title.Text = pic.title + "\nmedian of the rounds; bars from the least to the most"
	p.X.Label.Text, p.Y.Label.Text = "volumes", pic.unit
	p.Title.TextStyle.Font.Size, p.X.Label.TextStyle.Font.Size, p.Y.Label.TextStyle.Font.Size = 14, 12, 12
	var ticks []plot.Tick
	for _, n := range r.volumes {
		ticks = append(ticks, plot.Tick{Value: float64(n), Label: strconv.Itoa(n)})
	}
	p.X.Tick.Marker = plot.ConstantTicks(ticks)
	if pic.log {
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.TickerFunc(steps)
	}
	p.Add(plotter.NewGrid())
	p.Legend.Top, p.Legend.Left = true, true
	p.Legend.TextStyle.Font.Size, p.Legend.Padding = 10, vg.Points(2)
	shapes := []draw.GlyphDrawer{draw.CircleGlyph{}, draw.BoxGlyph{}, draw.TriangleGlyph{}, draw.PyramidGlyph{}, draw.RingGlyph{}, draw.SquareGlyph{}, draw.CrossGlyph{}, draw.PlusGlyph{}}
	for i, s := range r.subjects[pic.phase] {
		var data spreads
		for _, n := range r.volumes {
			if low, m, high, ok := r.spread(point{pic.phase, s, n}, pic.column); ok && m > 0 {
				data.XYs = append(data.XYs, plotter.XY{X: float64(n), Y: m / pic.scale})
				data.YErrors = append(data.YErrors, struct{ Low, High float64 }{(m - low) / pic.scale, (high - m) / pic.scale})
			}
		}
		if len(data.XYs) == 0 {
			continue
		}
		line, points, err := plotter.NewLinePoints(data.XYs)
		if err != nil {
			return err
		}
		bars, err := plotter.NewYErrorBars(data)
		if err != nil {
			return err
		}
		line.Color, points.Color, bars.Color = colours[i%len(colours)], colours[i%len(colours)], colours[i%len(colours)]
		line.Width = vg.Points(1.5)
		points.Shape, points.Radius = shapes[i%len(shapes)], vg.Points(3)
		p.Add(line, points, bars)
		p.Legend.Add(s, line, points)
	}
	p.X.Min, p.X.Max = 0, p.X.Max+1
	p.Y.Max *= 4 // room for the legend
	return p.Save(9*vg.Inch, 6*vg.Inch, file)
}
